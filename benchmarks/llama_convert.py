"""Run llama.cpp's own ``convert_hf_to_gguf.py`` on a GPT-OSS checkpoint, without its vocabulary.

    python llama_convert.py SOURCE CHECKPOINT --outfile FILE --outtype bf16

SOURCE is llama.cpp's folder; all else goes to its script, which keeps MXFP4 experts as they are.
Token numbers are all that a measurement needs, and the script refuses the tokenizer of a checkpoint
of random weights.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    script = Path(sys.argv.pop(1), "convert_hf_to_gguf.py")
    sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
    GptOss: Any = importlib.import_module("conversion.gpt_oss").GptOssModel
    GptOss.set_vocab = _set_vocab
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")


def _set_vocab(self: Any) -> None:
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])


if __name__ == "__main__":
    main()
