"""Past one machine: bulk moderation on the engines of the field (the extra ``scale``)."""
