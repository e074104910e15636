"""The list of clips: thresholds that select from it, and files that are damaged or of another kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reducio_fast.cli.main import main
from reducio_fast.data.curation import manifest, select
from reducio_fast.system.errors import ReducioError

pytestmark = pytest.mark.slow


def clip(number: int, **values) -> dict:
    row = dict.fromkeys(manifest.COLUMNS)
    return (
        row | {"id": f"{number:03d}", "video": f"{number}.mp4", "start": 0, "end": 40, "motion": float(number)} | values
    )


def test_thresholds_by_value_and_by_percentile() -> None:
    rows = [clip(i, text_area=0.1 * (i % 2)) for i in range(10)] + [clip(99, error="broken"), clip(11, end=8)]
    kept, drops = select.select(rows, [select.Threshold.parse("motion.min=20%")], 16)
    assert [row["id"] for row in kept] == [f"{i:03d}" for i in range(2, 10)]
    assert drops == {"unreadable": 1, "shorter than 16 frames": 1, "motion.min=20%": 2}
    kept, _ = select.select(
        rows, [select.Threshold.parse("text_area.max=0.05"), select.Threshold.parse("motion.max=5")], 16
    )
    assert [row["id"] for row in kept] == ["000", "002", "004"]
    with pytest.raises(ReducioError, match="no clip of the manifest has that score"):
        select.select(rows, [select.Threshold.parse("aesthetic.min=5")])
    for text, message in (
        ("motion=3", "must be SCORE.min=X or SCORE.max=X"),
        ("speed.min=3", "SCORE of motion, text_area"),
        ("motion.min=fast", "'fast' is neither a number nor a percentage"),
        ("motion.min=120%", r"lies in 0\.\.100"),
    ):
        with pytest.raises(ReducioError, match=message):
            select.Threshold.parse(text)


def test_a_threshold_drops_a_copy_by_its_own_score() -> None:
    rows = [clip(1, video=name, clip_similarity=score) for name, score in (("a", 0.1), ("b", 0.9))]
    kept, drops = select.select(rows, [select.Threshold.parse("clip_similarity.min=0.5")])
    assert [row["video"] for row in kept] == ["b"] and drops["clip_similarity.min=0.5"] == 1
    with pytest.raises(ReducioError, match="'nan' is neither a number nor a percentage"):
        select.Threshold.parse("motion.min=nan")


def test_errors_of_a_manifest_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ReducioError, match="holds no manifest .* make one with: reducio-fast curate"):
        manifest.read(tmp_path)
    manifest.write([clip(1)], tmp_path / "clips.parquet")
    whole = (tmp_path / "clips.parquet").read_bytes()
    (tmp_path / "clips.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ReducioError, match=r"clips.parquet is damaged: .*; remove clips.parquet and run"):
        manifest.read(tmp_path / "clips.parquet")
    with monkeypatch.context() as patched:
        patched.setattr(manifest, "VERSION", "7")
        manifest.write([clip(1)], tmp_path / "clips.parquet")
    with pytest.raises(ReducioError, match="manifest of version 7, this reads 1"):
        manifest.read(tmp_path / "clips.parquet")
    pyarrow, parquet = manifest.pyarrow_modules()
    parquet.write_table(pyarrow.table({"id": ["a"]}), tmp_path / "index.parquet")
    with pytest.raises(ReducioError, match="index.parquet is a Parquet file, but no manifest; reducio-fast curate"):
        manifest.read(tmp_path / "index.parquet")
    assert main(["curate", str(tmp_path / "nothing"), "-o", str(tmp_path)]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["curate", str(tmp_path), "-o", str(tmp_path)]) == 2
    assert "no video (.mp4" in capsys.readouterr().err


def test_a_changed_byte_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    """Wherever it is: a frame rate that still is a number is noticed too."""
    path = tmp_path / "clips.parquet"
    manifest.write([{"id": "a", "video": "v", "fps": 24.0}], path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(np.float64(24).tobytes(), np.float64(25).tobytes(), 1))
    assert path.read_bytes() != whole
    with pytest.raises(ReducioError, match=r"clips.parquet is damaged: .* run reducio-fast curate again"):
        manifest.read(path)


@pytest.mark.parametrize("about", ['{"manifest" "1"}', "[1]"])
def test_damaged_settings_of_a_manifest_are_refused(
    about: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are outside of the pages, which have checksums."""
    path = tmp_path / "clips.parquet"
    with monkeypatch.context() as patched:
        patched.setattr(manifest.json, "dumps", lambda values: about)
        manifest.write([clip(1)], path)
    for read in (manifest.read, manifest.made_with):
        with pytest.raises(ReducioError, match=r"clips.parquet is damaged: .* run reducio-fast curate again"):
            read(path)
