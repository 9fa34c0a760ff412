"""What settings cannot work, told before anything is loaded.

Rules of one key are tables; rules between keys are pairs of a condition and what to tell, in the order of the sections.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from lingshu_rl.config import Config, more_than_adapters
from lingshu_rl.data.sources import sources_of
from lingshu_rl.failures import ConfigError
from lingshu_rl.model.optimizers import Place, check_optimizer
from lingshu_rl.planning import engine_options
from lingshu_rl.settings import flat
from lingshu_rl.text.hiding import HIDDEN, is_secret, url_fault
from rewards.imports import hint

Rule = tuple[Any, str]  # whether it is broken, and what to tell then

AT_LEAST_1 = (
    "train.steps train.prompts_per_step train.group_size train.optimizer_steps rollout.max_tokens rollout.concurrency "
    "checkpoint.keep_last data.side_multiple judge.probe_rows reference.tensor_parallel".split()
)
NOT_NEGATIVE = (
    "rollout.servers rollout.retries rollout.request_timeout_s rollout.start_timeout_s reference.replicas "
    "reference.retries reference.refresh_every reference.request_timeout_s reference.start_timeout_s "
    "run.max_restarts train.warmup_steps packing.token_budget train.weight_decay train.max_grad_norm "
    "train.max_refills loss.kl_coef eval.every eval.limit checkpoint.every "
    "rewards.timeout_s judge.start_timeout_s".split()
)
SHARES = "rewards.max_failed_share data.max_refused_share judge.max_false_pay judge.max_false_refusal".split()
DTYPES = ("auto", "float32", "bfloat16")
# accelerate's; "all" is not among them, as a tracker that is not installed is an error here.
TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab")
CHOICES: Mapping[str, Sequence[Any]] = {
    "cluster": ("local", "ray"),
    "train.dtype": DTYPES,
    "train.lr_schedule": ("constant", "linear", "cosine"),
    "train.quantize": ("", "nf4", "fp4"),
    "train.gradient_checkpointing": (True, False, "auto"),
    "train.max_staleness": (0, 1),
    "reference.dtype": DTYPES,
    "rollout.weight_transfer": ("auto", "file", "nccl", "adapter"),
    "rollout.placement": ("auto", "servers", "colocate"),
    "rewards.read": ("auto", "closed", "prose"),
    "rewards.executor": ("inline", "isolated"),
    "data.too_long": ("refuse", "drop"),
    "data.curriculum": ("none", "pass_rate"),
    "check.on_failure": ("stop", "dense", "warn"),
    "eval.controls": ("blank", "shuffled", "text_only", "majority"),
    "run.trackers": TRACKERS,
}
MOST_ASSUMED = {"count": 1024, "memory_gb": 10_000, "nodes": 100_000}  # of devices.assume; more is a slip


def validate(config: Config) -> None:
    """Raises ConfigError, which names the keys, for the first rule that is broken."""
    for section in (_values, _train, _data, _rewards, _rollout, _servers, _reference, _deepspeed, _places):
        for broken, told in section(config):
            if broken:
                raise ConfigError(told)


def _values(c: Config) -> Iterator[Rule]:
    """Of each key alone."""
    values = flat(asdict(c))
    for key, value in values.items():
        unusable = isinstance(value, float) and not math.isfinite(value)
        yield unusable, f"{key}={value} is not a number that can be used"
        hidden = isinstance(value, str) and HIDDEN in value
        yield (
            hidden,
            f"{key} was hidden where these settings were stored; give it again, for example as ${{oc.env:NAME}}",
        )
    yield from ((values[key] < 1, f"{key}={values[key]} must be at least 1") for key in AT_LEAST_1)
    yield from ((values[key] < 0, f"{key}={values[key]} must not be negative") for key in NOT_NEGATIVE)
    yield from ((not 0 <= values[key] <= 1, f"{key} must be in [0, 1]") for key in SHARES)
    for key, allowed in CHOICES.items():
        value = values[key]
        for one in value if isinstance(value, list) else [value]:
            yield _not_among(key, one, allowed)
    yield MISSING in (c.model, c.run.dir) or not c.model or not c.run.dir, "model and run.dir must be set"


def _not_among(key: str, value: Any, allowed: Iterable[Any]) -> Rule:
    words = [str(one).lower() if isinstance(one, bool) else str(one) for one in allowed]
    return value not in allowed, f"{key}={value!r} is not one of {', '.join(words)}{hint(value, words)}"


def _train(c: Config) -> Iterator[Rule]:
    yield c.train.lr <= 0, f"train.lr={c.train.lr} must be above 0"
    yield (
        c.train.group_size == 1,
        "train.group_size=1 gives every advantage 0: a group is compared with itself. Use at least 2",
    )
    yield (
        c.train.max_staleness > 0 and c.loss.importance_cap == 0,
        "train.max_staleness=1 samples from older weights, which loss.importance_cap must correct; set it above 0",
    )
    yield (
        c.train.quantize and not c.train.lora,
        "train.quantize holds the weights in 4 bits, which cannot be trained; set train.lora to train adapters over "
        "them",
    )
    yield (
        c.advantage.variant == "gdpo" and c.advantage.overlong_buffer > 0,
        "advantage.overlong_buffer changes the summed reward, which advantage.variant=gdpo does not use; make length a "
        "part of rewards.spec instead",
    )
    yield (
        c.advantage.variant == "gdpo" and c.train.max_refills > 0,
        "advantage.variant=gdpo normalises over the whole batch, so train.max_refills cannot add to it; set it to 0",
    )


def _data(c: Config) -> Iterator[Rule]:
    yield (
        not 1 <= c.data.min_pixels <= c.data.max_pixels,
        f"data.min_pixels={c.data.min_pixels} must be at least 1 and at most data.max_pixels={c.data.max_pixels}",
    )
    drawn = c.data.curriculum != "none"
    weighed = {
        key: any(source.epochs or source.share for source in sources_of(given, f"data.{key}"))
        for key, given in (("train", c.data.train), ("test", c.data.test))
    }
    yield (
        drawn and weighed["train"],
        "data.curriculum draws by pass rates alone: leave out the epochs and shares of data.train",
    )
    yield weighed["test"], "data.test is asked once: leave out the epochs and shares of its sources"
    yield (
        drawn and c.train.max_staleness > 0,
        "data.curriculum follows each step's rewards, which a batch that runs ahead (train.max_staleness) may or may "
        "not have seen; unset one of them",
    )


def _rewards(c: Config) -> Iterator[Rule]:
    yield (
        c.rewards.read != "auto" and c.rewards.spec,
        "rewards.read belongs to the default composition, and rewards.spec replaces it; give `args: {read: ...}` there",
    )
    yield (
        (c.judge.vllm or c.devices.judge != "auto") and not c.judge.model,
        "judge.vllm or devices.judge is set, but no judge.model, which the run would start; unset them, or set it",
    )
    yield (
        c.judge.model and c.cluster != "local",
        "judge.model is started on this host alone; with cluster=ray give the judge's url in rewards.spec",
    )


def _rollout(c: Config) -> Iterator[Rule]:
    yield c.rollout.temperature <= 0, "rollout.temperature must be above 0: greedy samples of a group are all equal"
    for option, value in c.rollout.vllm.items():
        yield (
            is_secret(option) and isinstance(value, (str, list)),
            f"rollout.vllm.{option} would stand in a command line and in logs; servers take the run's own token, and "
            "what else is secret goes into the environment (HF_TOKEN)",
        )
    context = c.rollout.vllm.get("max_model_len")
    yield (
        isinstance(context, int) and 0 < context <= c.rollout.max_tokens,
        f"rollout.vllm.max_model_len={context} is prompt and completion together, and rollout.max_tokens="
        f"{c.rollout.max_tokens} leaves none of it to the prompt: raise the one or lower the other",
    )
    yield (
        c.rollout.vllm.get("disable_log_stats"),
        "rollout.vllm.disable_log_stats takes away the counts by which a busy server is told from a stuck one; leave "
        "it out",
    )
    yield (
        c.rollout.placement == "colocate"
        and (c.rollout.urls or c.rollout.servers or c.train.max_staleness or c.devices.rollout != "auto"),
        "rollout.placement=colocate samples in the policy's process, on its devices and between its updates: leave out "
        "rollout.urls, rollout.servers, devices.rollout and train.max_staleness",
    )
    adapters = c.rollout.weight_transfer == "adapter"
    yield (
        adapters and c.train.quantize,
        "rollout.weight_transfer=adapter would sample from the weights before train.quantize rounded them; use auto, "
        "which sends what the 4 bits stand for, adapters merged",
    )
    yield (
        adapters and not c.train.lora,
        "rollout.weight_transfer=adapter sends train.lora's adapters: set train.lora, or send all weights",
    )
    yield (
        adapters and c.rollout.placement == "colocate",
        "rollout.weight_transfer=adapter is for servers; colocate has the weights already",
    )
    extra = more_than_adapters(c.train.lora) if adapters else ""
    yield extra, f"{extra} is more than vLLM's adapters hold; use another rollout.weight_transfer, such as auto"


def _servers(c: Config) -> Iterator[Rule]:
    """Where they run: URLs, devices, a cluster."""
    groups = (
        ("rollout", c.rollout, c.devices.rollout, "servers", c.rollout.servers),
        ("reference", c.reference, c.devices.reference, "replicas", c.reference.replicas),
    )
    for name, group, devices, counted, count in groups:
        for index, url in enumerate(group.urls):
            yield url_fault(url), f"{name}.urls[{index}] {url_fault(url)}"
        yield (
            group.urls and devices != "auto",
            f"{name}.urls names running servers, so devices.{name} has no effect; unset one of them",
        )
        yield (
            group.urls and count > 0,
            f"{name}.{counted}={count} has no effect beside the URLs of running servers; unset it",
        )
        yield group.ray and c.cluster != "ray", f"{name}.ray is set, but only cluster=ray uses it"
        yield (
            c.cluster == "ray" and devices not in ("auto", "cpu"),
            f"devices.{name}={devices!r}: with cluster=ray, Ray picks the devices; say auto (GPUs) or cpu, and how "
            "many servers of which size by rollout.servers and rollout.vllm.tensor_parallel_size",
        )
    for key, value in c.devices.assume.items():
        yield _not_among("devices.assume", key, MOST_ASSUMED)
        whole = isinstance(value, int) or (key == "memory_gb" and isinstance(value, float))
        most, what = MOST_ASSUMED.get(key, 0), "number" if key == "memory_gb" else "whole number"
        yield (
            not whole or isinstance(value, bool) or not 0 < value <= most,
            f"devices.assume.{key}={value!r} must be a {what} above 0, at most {most:,}",
        )


def _reference(c: Config) -> Iterator[Rule]:
    yield (
        (c.reference.urls or c.reference.model) and c.loss.kl_coef == 0,
        "reference.urls or reference.model is set, but loss.kl_coef=0 uses no reference; unset one of them",
    )
    yield (
        c.reference.refresh_every > 0 and (c.loss.kl_coef == 0 or c.train.max_staleness > 0),
        "reference.refresh_every needs loss.kl_coef above 0 (else there is no reference) and train.max_staleness=0 (a "
        "batch collected ahead would have seen the reference of before)",
    )


def _deepspeed(c: Config) -> Iterator[Rule]:
    yield from ((True, fault) for fault in engine_options.faults(c.rollout.vllm, c.deepspeed))
    stage = (c.deepspeed.get("zero_optimization") or {}).get("stage", 0)
    yield (
        stage not in (1, 2, 3),
        f"deepspeed.zero_optimization.stage={stage!r} must be 1, 2 or 3 (0 adds up bfloat16 gradients in bfloat16 and "
        "tells no gradient norm; 1 does the same work in less memory)",
    )
    yield (
        c.train.quantize and stage == 3,
        "train.quantize with deepspeed.zero_optimization.stage=3: ZeRO-3 cannot divide 4-bit weights; use stage 2",
    )
    place = Place.of(c.deepspeed, on_gpu=True, max_grad_norm=c.train.max_grad_norm)  # the device is asked at the start
    check_optimizer("train.optimizer", c.train.optimizer, c.train.optimizer_args, place)


def _places(c: Config) -> Iterator[Rule]:
    """The folders that a run is given."""
    yield (
        c.resume not in ("auto", "never") and not os.path.isdir(c.resume),
        f"resume={c.resume!r} is neither auto, never nor the folder of a checkpoint",
    )
    try:
        place = next(path for path in (Path(c.run.dir), *Path(c.run.dir).absolute().parents) if path.exists())
        state = "not writable" if place.is_dir() else "no folder"
        yield not place.is_dir() or not os.access(place, os.W_OK), f"run.dir={c.run.dir}: {place} is {state}"
    except (OSError, ValueError) as error:
        yield True, f"run.dir={c.run.dir[:80]!r} cannot be a folder's name: {getattr(error, 'strerror', None) or error}"
