"""`pi05c samples`, and the options by which a LeRobot dataset becomes samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pi05c.cli.app import Debug, Json, Quiet, Verbose, app
from pi05c.cli.output import echo, make_progress, print_json
from pi05c.graph.errors import UsageError

if TYPE_CHECKING:
    from pi05c.lerobot.observations import Observations
    from pi05c.progress import Progress
    from pi05c.samples import Given

Tokenizer = Annotated[
    Path | None,
    typer.Option(
        help="PaliGemma's tokenizer, for a LeRobot dataset: a sentencepiece .model, or a folder with one or with tokenizer.json."
    ),
]
Camera = Annotated[
    list[str] | None,
    typer.Option(help="VIEW=CAMERA, where the dataset calls a camera of the policy otherwise."),
]
Frames = Annotated[
    int | None,
    typer.Option(help="Samples to make of a LeRobot dataset, evenly spread over it; 32 if not given."),
]
Preprocess = Annotated[
    str | None,
    typer.Option(
        help="Of a LeRobot dataset: openpi, lerobot, or lerobot-0.4; that of the checkpoint if not given."
    ),
]


@dataclass(frozen=True)
class FromDataset:
    """What the options of a dataset were given."""

    tokenizer: Path | None
    camera: Sequence[str] | None
    frames: int | None
    preprocess: str | None

    def named(self) -> list[str]:
        """The options that were given."""
        return [f"--{name}" for name, value in vars(self).items() if value is not None]


@app.command()
def samples(
    model: Annotated[Path, typer.Argument(help="The plain ONNX graph.")],
    dataset: Annotated[Path, typer.Argument(help="Folder of a LeRobot dataset, format v3.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz file to write.")],
    tokenizer: Tokenizer = None,
    camera: Camera = None,
    frames: Frames = None,
    preprocess: Preprocess = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Make samples of a LeRobot dataset, preprocessed as pi0.5 does, for --calibration."""
    from pi05c.samples import save_samples

    if output.suffix != ".npz":
        raise UsageError(f"the output {output} must end in .npz")
    progress = make_progress(quiet, verbose)
    made = _observations(model, dataset, FromDataset(tokenizer, camera, frames, preprocess), progress)
    with progress.stage("samples") as update:
        found = []
        for sample in made:
            found.append(sample)
            update(len(found) / len(made), f"sample {len(found)} of {len(made)}")
        save_samples(output, found)
    if json_:
        print_json({"samples": str(output), "count": len(made), "source": made.source, "notes": made.notes})
    elif not quiet:
        echo(f"{output}: {len(made)} samples of {made.source}")


def given_samples(model: Path, calibration: Sequence[str], options: FromDataset, progress: Progress) -> Given:
    """What `--calibration` names: files and folders as they are, or the samples of a dataset.

    Raises:
        UsageError: a dataset stands beside others, or options of a dataset without one.
        Pi05cError: as `Observations`.
    """
    from pi05c.samples import is_lerobot_dataset

    if any(is_lerobot_dataset(Path(item)) for item in calibration):
        if len(calibration) > 1:
            raise UsageError("--calibration names a LeRobot dataset beside others: name it alone")
        return _observations(model, Path(calibration[0]), options, progress)
    if named := options.named():
        raise UsageError(
            f"{named[0]} is for a LeRobot dataset: give --calibration its folder, in which meta/info.json lies"
        )
    return calibration


def _observations(model: Path, dataset: Path, options: FromDataset, progress: Progress) -> Observations:
    """The samples of a dataset; what was decided of them is said."""
    from pi05c.lerobot.observations import Observations

    if options.tokenizer is None:
        raise UsageError(
            f"{dataset} holds tasks in words: give --tokenizer FILE, paligemma_tokenizer.model of openpi or the folder of "
            "google/paligemma-3b-pt-224"
        )
    cameras = {}
    for text in options.camera or ():
        view, _, name = text.partition("=")
        if not (view and name):
            raise UsageError(f"--camera {text} is not VIEW=CAMERA")
        cameras[view] = name
    made = Observations(
        dataset,
        model,
        tokenizer=options.tokenizer,
        cameras=cameras,
        frames=options.frames,
        preprocess=options.preprocess,
    )
    for note in made.notes:
        progress.note(note)
    return made


__all__ = ["Camera", "Frames", "FromDataset", "Preprocess", "Tokenizer", "given_samples"]
