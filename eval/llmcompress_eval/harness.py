"""lm-eval's own command, which then loads compressed checkpoints as any `hf` model.

python -m llmcompress_eval.harness --model hf --model_args pretrained=runs/compressed --tasks piqa
"""

from lm_eval.__main__ import cli_evaluate

import llmcompress  # noqa: F401  (registers the format with transformers)

if __name__ == "__main__":
    cli_evaluate()
