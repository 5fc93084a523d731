"""What the doctor says of one thing that it looked at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fix` is empty where nothing is to be done."""

    what: str
    found: str
    fix: str = ""
    missing: bool = False


#: Where the public checkpoints and data sets come from; data/README.md says more.
HOMES = {
    "chatglm2_6b": "download huggingface.co/THUDM/chatglm2-6b to SRC, run python scripts/convert_chatglm2.py SRC DST, "
    "then llm.path=DST",
    "glm4_9b": "download huggingface.co/THUDM/glm-4-9b-chat-hf, then llm.path=FOLDER; or give the hub id itself",
    "visualglm": "download huggingface.co/THUDM/visualglm-6b to SRC, run python scripts/convert_visualglm.py SRC DST, "
    "then vision.path=DST",
    "blip2": "download huggingface.co/Salesforce/blip2-opt-2.7b, then vision.path=FOLDER; or give the hub id itself",
    "m3e_base": "download huggingface.co/moka-ai/m3e-base, then retriever.path=FOLDER; or give the hub id itself",
    "resnet": "download huggingface.co/microsoft/resnet-18, then baseline.resnet=FOLDER; or give the hub id itself",
    "m3ed": "get it from github.com/AIM3-RUC/RUCM3ED, then data.path=FOLDER",
    "cped": "get it from github.com/scutcyr/CPED, then data.path=FILE.csv",
}


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
