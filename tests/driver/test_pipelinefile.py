"""`--passes @FILE`: what a file may hold, and that it means what its text would."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Command

from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.pipelinefile import expand, read_pipeline_file, write_pipeline_file
from pi05c.plugins import parse_passes

TEXT = (
    "canonicalize,fuse_projections{max_scale_ratio=4},quantize_linears{llm=nvfp4,keep=*layers.[01].*,a.b+c.weight},"
    "insert_attention_qdq{vision=true,rewrite_limit=3}"
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    steps = parse_passes(TEXT)
    provenance = {"tool": 'a "tool" \\ é', "figures": {"LLM 3 MLP": 0.25, "count": 3}, "made_up": False}
    write_pipeline_file(tmp_path / "a.toml", steps, provenance, "a title")
    found = read_pipeline_file(tmp_path / "a.toml")
    assert parse_passes(found.text) == steps
    assert found.provenance == provenance
    assert (tmp_path / "a.toml").read_text().startswith("# a title\n")


def test_a_file_stands_among_other_items(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", '[[passes]]\nname = "default"\n')
    text = f"@{path},-pin_fp32,lower_precision{{headroom=2}}"
    assert parse_passes(text) == parse_passes("default,-pin_fp32,lower_precision{headroom=2}")
    assert expand("default") == "default"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("passes = 3", "lists no passes"),
        ("[[passes]]\nllm = 'fp8'", "without a name"),
        ("[[passes]]\nname = 'dedupe'\n[[more]]\nname = 'x'", "'more'"),
        ("[[passes", "is no TOML"),
        ("[[passes]]\nname = 'quantize_linears'\nkeep = ['a{b']", "'a{b'"),
    ],
)
def test_files_that_are_no_pipeline_are_refused(text: str, named: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", text)
    with pytest.raises(Pi05cError, match=named) as caught:
        parse_passes(f"@{path}")
    assert "a.toml" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["[[passes]]\nname = 'no_such_pass'", "[[passes]]\nname = 'quantize_linears'\nkeeps = ['a']"],
)
def test_unknown_names_in_a_file_are_usage_errors(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no_such_pass|keeps"):
        parse_passes(f"@{write(tmp_path / 'a.toml', text)}")


def test_a_file_that_is_not_there(pi05c: Command, tmp_path: Path) -> None:
    result = pi05c("cost", tmp_path / "model.onnx", "--passes", f"@{tmp_path / 'no.toml'}")
    assert result.status == 1
