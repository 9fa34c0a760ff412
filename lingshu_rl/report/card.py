"""The model card of a run, written from what the run measured, and its way to the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lingshu_rl.config import Config
from lingshu_rl.data.sources import paths_in
from lingshu_rl.failures import LingshuError
from lingshu_rl.report.html import RunData, load_run
from lingshu_rl.report.text import duration
from lingshu_rl.settings import flat, to_yaml
from lingshu_rl.storage.runfolder import RunFolder

CONTROLS = {
    "blank_image": "blank images",
    "shuffled_image": "another question's image",
    "text_only": "no image",
    "majority_answer": "the most frequent answer",
}
# What only says where a run took place, and what must not leave the machine.
PRIVATE = tuple(
    "run resume model data.train data.test devices cluster rollout.urls rollout.env rollout.servers reference.urls "
    "reference.model rewards.spec".split()
)
LIMITS = """\
This model is a research artefact and no medical device. It must not be used for diagnosis or treatment. \
The scores are of one
held-out set; where a control comes near them, the questions can be answered without the image."""


class CardError(LingshuError, ValueError):
    """A run of which there is no model to tell of."""


def write_card(run: Path) -> Path:
    """Write README.md into the Hugging Face folder of the run's newest checkpoint; returns that folder. Raises
    CardError."""
    try:
        data = load_run(run)
    except FileNotFoundError as error:
        raise CardError(str(error)) from None
    checkpoint = RunFolder(run).newest_checkpoint()
    if checkpoint is None or not (checkpoint / "hf").is_dir():
        raise CardError(f"{run} has no checkpoint yet: a card is written beside a model")
    (checkpoint / "hf" / "README.md").write_text(card(data), encoding="utf-8")
    return checkpoint / "hf"


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload the folder as ORG/NAME on the Hub; returns its address. With the token of `hf auth login`. Needs the
    network."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Model and card of a lingshu-rl run"))


def card(data: RunData) -> str:
    """Markdown with the Hub's front matter."""
    base = str(data.config.get("model", "demo"))
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        **({"base_model": base} if base.count("/") == 1 and not base.startswith((".", "/", "~")) else {}),
        "tags": ["lingshu-rl", "medical", "grpo", "rlvr"],
    }
    told = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    name = base.rstrip("/").rsplit("/", 1)[-1]
    return f"---\n{told}\n---\n\n# {name}, trained by lingshu-rl\n\n" + "\n\n".join(_parts(data)) + "\n"


def _parts(data: RunData) -> Iterator[str]:
    config, summary = data.config, data.summary
    yield (
        f"Fine-tuned by reinforcement learning with verifiable rewards ({_setting(config, 'loss.variant', 'grpo')}): "
        f"{len(data.metrics)} updates of {_setting(config, 'train.prompts_per_step', '?')} prompts with "
        f"{_setting(config, 'train.group_size', '?')} completions each."
    )
    yield "## Results\n" + "\n".join(_results(summary))
    sources = {name: paths_in((config.get("data") or {}).get(name, "")) for name in ("train", "test")}
    yield "## Data\n" + "\n".join(
        f"* {name}: {', '.join(Path(path).name or path for path in paths)}" for name, paths in sources.items()
    )
    spec = (config.get("rewards") or {}).get("spec")
    yield "## Rewards\n" + (
        f"```json\n{json.dumps(spec, indent=1, ensure_ascii=False)}\n```"
        if spec
        else "The default of each kind of question."
    )
    yield "## Settings\nThose that differ from the library's defaults.\n\n" + "\n".join(_changed(config))
    seconds = summary.get("seconds_total")
    versions = ", ".join(f"{name} {version}" for name, version in sorted(data.versions.items()) if name != "platform")
    yield "## How\n" + (f"{duration(seconds)}. " if seconds else "") + f"Versions: {versions or 'unknown'}."
    yield "## Limits\n" + LIMITS


def _results(summary: Mapping[str, Any]) -> Iterator[str]:
    yield "| held-out questions | accuracy | 95 % interval |"
    yield "|---|--:|---|"
    for key, label in {"before": "before", "after": "after", **CONTROLS}.items():
        if found := summary.get(key):
            yield f"| {label} | {_percent(found.get('accuracy'))} | {_interval(found.get('ci95'))} |"
    gain = summary.get("gain") or {}
    if gain.get("points") is not None:
        low, high = gain["ci95"]
        yield f"\nGain: {gain['points']:.1f} points (95 % interval {low:.1f} to {high:.1f}, paired over images)."


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.1f} %"


def _interval(ci95: Any) -> str:
    return f"{100 * ci95[0]:.1f} to {100 * ci95[1]:.1f}" if ci95 else ""


def _changed(config: Mapping[str, Any]) -> Iterator[str]:
    from omegaconf import OmegaConf

    defaults = flat(OmegaConf.to_container(OmegaConf.create(to_yaml(Config()))))
    yield "| setting | value |"
    yield "|---|---|"
    for key, value in sorted(flat(dict(config)).items()):
        if value != defaults.get(key) and not any(key == p or key.startswith(f"{p}.") for p in PRIVATE):
            yield f"| `{key}` | `{value}` |"


def _setting(config: Mapping[str, Any], key: str, default: str) -> Any:
    return flat(dict(config)).get(key, default)


def main(run: str, name: str, *, private: bool) -> int:
    """`lingshu-rl card`."""
    from lingshu_rl.exits import exit_code

    def work() -> None:
        folder = write_card(Path(run))
        print(f"card: {folder / 'README.md'}")
        if name:
            print(push(folder, name, private=private))

    return exit_code(work, "the card", wrong=(CardError,))
