"""Commands from folder to folder: verify, merge, quantize, export, average."""

from __future__ import annotations

from typing import Any

from llmkit.commands.options import tool


def add(commands: Any) -> None:
    """Adds the parsers."""
    verify = commands.add_parser("verify", help="check a checkpoint: manifest, hashes, shapes, finite values")
    verify.add_argument("folder", help="a run (all its checkpoints), a checkpoint or a Hugging Face folder")
    verify.set_defaults(run=tool("llmkit.tools.verify"))

    merge = commands.add_parser("merge", help="one plain model from adapters and the model they belong to")
    merge.add_argument("adapter", help="a run, a checkpoint or a PEFT folder with adapters")
    merge.add_argument("out", help="the folder to write")
    merge.set_defaults(run=tool("llmkit.tools.merge"))

    quantize = commands.add_parser("quantize", help="a model in 8 or 4 bits a weight, for inference")
    quantize.add_argument("model", help="a run, a checkpoint or a Hugging Face folder")
    quantize.add_argument("out", help="the folder to write")
    quantize.add_argument("--bits", type=int, choices=(8, 4), required=True)
    quantize.add_argument("--dynamic", action="store_true", help="8 bits: inputs are rounded as well, as they come")
    quantize.add_argument("--group", type=int, metavar="N", help="4 bits: weights that share a scale; default: 32")
    quantize.add_argument(
        "--calibrate", metavar="FILE", help="4 bits: texts or conversations on which the products are to stay (GPTQ)"
    )
    quantize.add_argument("--field", help="--calibrate: where a document stands in its row; default: text")
    quantize.set_defaults(run=tool("llmkit.export.quantize"))

    export = commands.add_parser("export", help="a model for other programs: GGUF (llama.cpp), ONNX")
    export.add_argument("model", help="a run, a checkpoint or a Hugging Face folder")
    export.add_argument("out", help="gguf: the file to write; onnx: the folder")
    export.add_argument("--format", choices=("gguf", "onnx"), required=True)
    export.add_argument(
        "--type",
        choices=("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
        help="of the matrices; default: f16 (gguf), f32 (onnx, which has no other)",
    )
    export.set_defaults(run=tool("llmkit.export.command"))

    average = commands.add_parser("average", help="one model from several of one shape: the mean of their weights")
    average.add_argument("out", help="the folder to write")
    average.add_argument("models", nargs="+", help="runs, checkpoints or Hugging Face folders")
    average.add_argument("--last", type=int, metavar="N", help="the last N checkpoints of the one run that is named")
    average.add_argument("--weights", metavar="A,B", help="shares of the models; default: equal")
    average.add_argument("--ema", action="store_true", help="of the averages that training kept (optim.ema_decay)")
    average.set_defaults(run=tool("llmkit.tools.average"))
