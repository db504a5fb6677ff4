"""The server: OpenAI's wire and others over one chat model and its guard; needs the extra ``serve``."""
