"""Run a guard exported for sequence classification by transformers and PEFT alone, and compare with its own logits.

lora-guard export OUT --guard GUARD --to peft-seqcls
python examples/verify_peft_seqcls.py OUT BASE

With --base-out FOLDER it also saves the base model with an empty classification head, which is what vLLM starts from.
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

TOLERANCE = 1e-3
"""The highest difference of a logit in fp32; adapter and head are the same numbers on both sides."""


def main() -> None:
    """Replay the test vectors of an export, and exit with 1 if a logit differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="folder that lora-guard export --to peft-seqcls wrote")
    parser.add_argument("base", help="the chat model: a folder or a hub id")
    parser.add_argument("--base-out", type=Path, help="save the model that a server loads the export onto")
    arguments = parser.parse_args()
    vectors = load_file(arguments.export / "test_vectors.safetensors")
    rows, labels = vectors["logits"].shape

    base = AutoModelForSequenceClassification.from_pretrained(arguments.base, num_labels=labels, dtype=torch.float32)
    base.config.pad_token_id = None  # rows are read one at a time, and a row may end with the padding token
    if arguments.base_out is not None:
        torch.nn.init.zeros_(base.score.weight)
        base.save_pretrained(arguments.base_out)
        AutoTokenizer.from_pretrained(arguments.base).save_pretrained(arguments.base_out)
    model = PeftModel.from_pretrained(base, arguments.export).eval()

    highest, start = 0.0, 0
    with torch.inference_mode():
        for row, length in enumerate(vectors["lengths"].tolist()):
            ids = torch.from_numpy(vectors["ids"][None, start : start + length]).long()
            logits = model(input_ids=ids).logits[0]
            highest = max(highest, float((logits - torch.from_numpy(vectors["logits"][row])).abs().max()))
            start += length
    print(f"{rows} rows, {labels} labels: the logits differ by at most {highest:.2g}")
    if not highest <= TOLERANCE:
        sys.exit(f"the logits differ by {highest:.2g}; allowed: {TOLERANCE}")


if __name__ == "__main__":
    main()
