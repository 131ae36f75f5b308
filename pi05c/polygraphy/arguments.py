"""What `polygraphy run` gets from pi05c: the runner `--pi05c` and the options of its passes.

Every `polygraphy run` imports this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polygraphy.tools.args import ModelArgs, OnnxLoadArgs
from polygraphy.tools.args import util as args_util
from polygraphy.tools.args.base import BaseArgs, BaseRunnerArgs
from polygraphy.tools.script import make_invocable

_MODULE = "pi05c.polygraphy"


class PassesArgs(BaseArgs):  # type: ignore[misc]
    """
    pi05c Passes: rewriting the model before pi05c runs it

    Depends on:

        - ModelArgs
        - OnnxLoadArgs
    """

    def add_parser_args_impl(self) -> None:
        """Declare the options."""
        self.group.add_argument(
            "--pi05c-passes",
            help="The passes, in order, such as 'fuse_denoise_loop,pin_fp32', 'exact' or 'default,-fold_gqa'. "
            "'none' runs the model as it is. Defaults to 'default'. See `pi05c passes`",
            default=None,
        )
        self.group.add_argument(
            "--pi05c-plugin",
            help="Python file(s), or installed entry point(s), that bring further passes",
            nargs="+",
            default=None,
        )
        self.group.add_argument(
            "--pi05c-calibration",
            help="Samples that ranges are measured on: .npz file(s), folder(s) of them, or 'synthetic' for made-up "
            "ones beside the model. Defaults to MODEL.calibration.npz beside the model",
            nargs="+",
            default=None,
        )
        self.group.add_argument(
            "--pi05c-rewrite-limit",
            help="NAME=N, or N for every pass: stop it after its first N rewrites",
            nargs="+",
            default=None,
        )
        self.group.add_argument(
            "--pi05c-stop-after", help="The last pass to run, by name or as 03-name", default=None
        )

    def parse_impl(self, args: Any) -> None:
        """Parse the options.

        Attributes:
            passes (str): Pipeline text.
            plugins (List[str]): Files and entry points that bring passes.
            calibration (List[str]): Files and folders of samples.
            rewrite_limit (List[str]): After how many rewrites passes are stopped.
            stop_after (str): The last pass to run.
        """
        self.passes = args_util.get(args, "pi05c_passes")
        self.plugins = _absolute(args_util.get(args, "pi05c_plugin"))
        self.calibration = _absolute(args_util.get(args, "pi05c_calibration"))
        self.rewrite_limit = args_util.get(args, "pi05c_rewrite_limit")
        self.stop_after = args_util.get(args, "pi05c_stop_after")

    def add_to_script_impl(self, script: Any) -> Any:
        """Add the loader.

        Returns:
            str: The name of the `ApplyPasses` loader; where no pass runs, the model's path or the loader of it.
        """
        path = self.arg_groups[ModelArgs].path
        in_memory = self.arg_groups[OnnxLoadArgs].must_use_onnx_loader()
        model = self.arg_groups[OnnxLoadArgs].add_to_script(script) if in_memory else path
        if self.passes == "none":
            return model
        script.add_import(imports=["ApplyPasses"], frm=_MODULE)
        loader = make_invocable(
            "ApplyPasses",
            model,
            passes=self.passes,
            plugins=self.plugins,
            calibration=self.calibration,
            rewrite_limit=self.rewrite_limit,
            stop_after=self.stop_after,
            path=path if in_memory else None,
        )
        return script.add_loader(loader, "apply_passes")


class Pi05cRunnerArgs(BaseRunnerArgs):  # type: ignore[misc]
    """
    pi05c Inference: running inference with pi05c

    Depends on:

        - PassesArgs
    """

    def get_name_opt_impl(self) -> tuple[str, str]:
        """Name and option of the runner."""
        return "pi05c", "pi05c"

    def get_extra_help_text_impl(self) -> str:
        """What stands behind the option's help."""
        return (
            "It rewrites the model by passes and runs it in ONNX-Runtime, with the bits of its number formats"
        )

    def add_to_script_impl(self, script: Any) -> None:
        """Add the runner."""
        script.add_import(imports=["Pi05cRunner"], frm=_MODULE)
        script.add_runner(make_invocable("Pi05cRunner", self.arg_groups[PassesArgs].add_to_script(script)))


def argument_groups() -> list[BaseArgs]:
    """The groups that `polygraphy run` adds to its own; an entry point of the group `polygraphy.run.plugins`."""
    return [PassesArgs(), Pi05cRunnerArgs()]


def _absolute(names: list[str] | None) -> list[str] | None:
    """Names of files that exist made absolute, so that a generated script runs from anywhere."""
    return names and [str(Path(name).absolute()) if Path(name).exists() else name for name in names]


__all__ = ["PassesArgs", "Pi05cRunnerArgs", "argument_groups"]
