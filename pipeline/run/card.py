"""The README.md of an export, which is the model card of a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from pipeline.config import Config
from pipeline.credentials import public
from pipeline.run.exported import Exported
from pipeline.run.metrics import Metric, metric_of
from pipeline.wording import counted, in_markdown, in_time, one_line

_MOST_NAMED = 100  # classes in a table; with more, export.json has their names

_FILES = {
    "G_ema.pt2": "G as a program: plain torch runs it, without ShardGAN",
    "G_ema.onnx": "the same for ONNX runtimes",
    "G_ema.onnx.data": "the weights of `G_ema.onnx`",
    "G_ema.safetensors": "the moving average of G: the one to sample from",
    "G.safetensors": "G itself, without averaging",
    "D.safetensors": "D, the discriminator",
    "config.yaml": "the settings it was trained with; `shardgan train config.yaml data.train=FOLDER` takes "
    "them again",
    "export.json": "what this card says, for programs",
}


def card(config: Config, facts: Exported) -> str:
    """Markdown, with the Hub's YAML in front. It says nothing of the machine."""
    parts = [
        _front_matter(config, facts),
        f"# {in_markdown(facts.name)}",
        *([f"![{_picture(config)}](samples.png)"] if "samples.png" in facts.files else []),
        _what(config, facts),
        *_classes(facts),
        *_scores(config, facts),
        *_plain(config, facts),
        _ours(config, facts),
        _files(config, facts),
        _licence(config, facts),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _front_matter(config: Config, facts: Exported) -> str:
    tags = ["gan", "image-generation", "pytorch", "shardgan"]
    tags += [config.G.kind] if ":" not in config.G.kind else []
    tags += ["onnx"] if "G_ema.onnx" in facts.files else []
    entries = {"library_name": "shardgan", "pipeline_tag": "unconditional-image-generation", "tags": tags}
    return f"---\n{yaml.safe_dump(entries, sort_keys=False)}---"


def _picture(config: Config) -> str:
    if config.data.latents and config.data.decoder is None:
        return "The first channels of latents made by G_ema"
    return "Images made by G_ema"


def _what(config: Config, facts: Exported) -> str:
    data, penalty = config.data, config.penalty
    colour = "latents" if data.latents else "grey images" if data.channels == 1 else "RGB images"
    classes = f", each of one of {counted(facts.num_classes, 'class')}" if facts.num_classes else ""
    owned = counted(facts.training_images, "image") if facts.training_images else "the images"
    apart = f" ({facts.heldout_images:,} more were held out)" if facts.heldout_images else ""
    trained = f"D was shown {facts.cur_nimg:,} of them, counting repeats."
    if facts.data_since >= 0:
        now = facts.cur_nimg - facts.data_since
        trained = f"D was shown {now:,} of them, counting repeats, after {facts.data_since:,} of other data."
    if config.run.init is not None:
        trained += f" It began with the weights of {_code(public(Path(str(config.run.init)).name))}."
    past = _changed(facts)
    return f"""
A generator G and a discriminator D of {data.size}x{data.size} {colour}{classes}, trained by ShardGAN on
{owned} of {_code(public(str(data.train)))}{apart}. {trained}

Networks: G {_code(config.G.kind)}, D {_code(config.D.kind)}. Loss: {_code(config.loss.kind)}. L2 penalties:
λ_G = {in_time(penalty.G.l2)} on `{penalty.G.on}`, λ_D = {in_time(penalty.D.l2)} on `{penalty.D.on}`.{past}"""


def _changed(facts: Exported) -> str:
    if not facts.changes:
        return ""
    rows = (
        f"- {row['key']}: {row['old']} → {row['new']} after {row['cur_nimg']:,} images"
        for row in facts.changes
    )
    return "\n".join(["\n\nThese settings are those of the end. Some were others before:\n", *rows])


def _classes(facts: Exported) -> Iterator[str]:
    names = [in_markdown(name) for name in facts.classes]
    if not names or names == [str(label) for label in range(len(names))]:
        return
    if len(names) > _MOST_NAMED:
        yield f"The names of the {len(names):,} classes are in `export.json`."
        return
    rows = "\n".join(f"| {label} | {name} |" for label, name in enumerate(names))
    yield f"| c | class |\n|---:|---|\n{rows}"


def _code(text: str) -> str:
    """A span of code, whatever the text holds."""
    if "`" not in text:
        return f"`{one_line(text)}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{fence} {one_line(text)} {fence}"


def _began_otherwise(config: Config, facts: Exported) -> bool:
    """Whether the weights have seen other data than these, or another split of them."""
    return facts.data_since >= 0 or config.run.init is not None


def _scores(config: Config, facts: Exported) -> Iterator[str]:
    rows = [
        f"| `{chart.removeprefix('Metrics/')}` | {metric.help}, {_better(metric)} | {value:.5g} "
        f"| {_counts(chart, facts.scores or {})} |"
        for chart, value in (facts.scores or {}).items()
        if (metric := metric_of(chart)) is not None
    ]
    if not rows:
        yield "It has no scores: none were computed of this checkpoint."
        return
    lines = ["| score | what | value | of |", "|---|---|---:|---|", *rows]
    yield "\n".join(lines)
    if reference := (facts.against or {}).get("heldout"):
        never = "" if _began_otherwise(config, facts) else " and were never trained on"
        yield (
            f"Held-out images come from the same data{never}. Scores compare only if they\nare against the "
            f"same images, processed alike; these have the fingerprint `{reference}`."
        )


def _better(metric: Metric) -> str:
    if metric.lower_is_better is None:
        return "copies if the ratio is well below 1, or their share well above 0.01"
    return "lower is better" if metric.lower_is_better else "higher is better"


def _counts(chart: str, scores: dict[str, float]) -> str:
    """Images that a score was computed of."""
    if chart == "Metrics/fid50k_full":
        return "50,000 generated, all training images"
    of = {
        kind: next((int(v) for k, v in scores.items() if k.endswith(f"_{kind}_images")), 0)
        for kind in ("fake", "real", "train")
    }
    metric = metric_of(chart)
    if chart.endswith("_train"):
        count = min(of["fake"], of["train"])
        return f"{count:,} generated, {count:,} training images"
    train = f", {of['train']:,} training images" if metric and metric.needs_train else ""
    return f"{of['fake']:,} generated, {of['real']:,} held-out images{train}"


def _plain(config: Config, facts: Exported) -> Iterator[str]:
    """How to use it without ShardGAN."""
    made, shape, clamp, pixels = _made(config)
    count = facts.num_classes
    if "G_ema.pt2" in facts.files:
        labels = f"\nc = torch.arange(16) % {count}  # int64 [16]: the classes" if count else ""
        version = ".".join(torch.__version__.split(".")[:2])
        yield f"""
## Use

With torch {version} or newer alone, in the folder of these files:

```python
import torch

G = torch.export.load("G_ema.pt2").module()
z = torch.randn(16, {config.G.z_dim})  # any number of images from 1{labels}
with torch.no_grad():
    {made} = G(z{", c" * bool(count)}){clamp}  # float32 [16, {shape}]
{pixels}```

On a GPU: `.module().to("cuda")`, and inputs on it."""
    if "G_ema.onnx" in facts.files:
        labels = f', "c": np.arange(16) % {count}' if count else ""
        yield f"""
With numpy and onnxruntime alone:

```python
import numpy as np
import onnxruntime

G = onnxruntime.InferenceSession("G_ema.onnx")
z = np.random.standard_normal((16, {config.G.z_dim})).astype(np.float32)
({made},) = G.run(None, {{"z": z{labels}}})  # float32 [16, {shape}]
```"""


def _made(config: Config) -> tuple[str, str, str, str]:
    """What G makes, the shape of one, and what clamps them and makes pixels of them."""
    data = config.data
    shape = f"{data.channels}, {data.size}, {data.size}"
    if data.latents:
        return "latents", shape, "", ""
    return "images", shape, ".clamp(-1, 1)", "pixels = ((images + 1) * 127.5).round().to(torch.uint8)\n"


def _ours(config: Config, facts: Exported) -> str:
    own = ", ".join(_code(kind) for kind in dict.fromkeys((config.G.kind, config.D.kind)) if ":" in kind)
    needs = f"\nIts networks are not ShardGAN's own: {own} must be importable too.\n" if own else ""
    classes = "; classes=0, or a name: one class alone" if facts.num_classes else ""
    shape = "C, H, W" if config.data.latents else _made(config)[1]
    return f"""
## Use with ShardGAN

Install it by `pip install .` in a clone of its repository.
{needs}
```python
import shardgan

G = shardgan.load(".")  # the folder of these files, or "USER/NAME" of the Hub
images = shardgan.sample(G, seeds=range(16))  # uint8 [16, {shape}]{classes}
```"""


def _files(config: Config, facts: Exported) -> str:
    whats = dict(_FILES)
    if facts.changes:
        whats["config.yaml"] = "the settings at its end, which were not the same in all of the training"
    rows = "\n".join(f"| `{name}` | {what} |" for name, what in whats.items() if name in facts.files)
    decoder = config.data.decoder
    latents = (
        f"\n\nG makes latents, and what makes images of them is not among the files: "
        f"{_code(decoder) if decoder else 'no decoder was set'}."
    )
    return f"""
## Files

| file | what |
|---|---|
{rows}

Weights are whole and float32, named as in the modules. z is standard normal, and images go from -1, black,
to 1, white.{latents * config.data.latents}"""


def _licence(config: Config, facts: Exported) -> str:
    of_data = (
        f"The training images' licence, according to their index: {in_markdown(facts.license)}."
        if facts.license
        else "The licence of the training images is not known here."
    )
    if _began_otherwise(config, facts):
        of_data += "\nThat of images that it was trained on before these is not part of this card."
    return f"""
## Licence

{of_data}
The licence of the weights is for whoever publishes them to state: add `license:` at the top of this file."""
