"""Files are written completely or not at all, under names that every system accepts."""

from __future__ import annotations

import errno
import os
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core import files
from core.errors import StudioError

OLD, NEW = b"an older song", bytes(range(256)) * 40
PIECES = (NEW[:4000], memoryview(NEW)[4000:4001], NEW[4001:])
CALLS = ("open", "write", "fsync", "close", "replace")
"""The system calls of a write, besides the clean-up."""


class Faults:
    """Counts the system calls of `core.files`, and lets one of them fail."""

    def __init__(self, monkeypatch, at: int | None, fault) -> None:
        self.made, self._at, self._fault = [], at, fault
        for name in CALLS:
            monkeypatch.setattr(files.os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name, call):
        def counted(*args):
            self.made.append(name)
            if len(self.made) - 1 != self._at:
                return call(*args)
            if name == "close":
                call(*args)  # a failing close frees its handle too
            return self._fault(call, *args)

        return counted


def raises(error):
    def fault(*_):
        raise error

    return fault


def short(call, *args):
    """A disk that takes only the first half, or no more than the call before."""
    return call(args[0], bytes(args[1])[: len(args[1]) // 2])


def calls_of_a_write(folder: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, None, None)
        files.atomic_write(folder / "counted.wav", PIECES, durable=True)
    (folder / "counted.wav").unlink()
    return faults.made


EVERY_CALL = [
    "open",
    "write",
    "write",
    "write",
    "fsync",
    "close",
    "replace",
    "open",
    "fsync",
    "close",
]


def test_the_system_calls_of_a_write(tmp_path):
    assert calls_of_a_write(tmp_path) == EVERY_CALL


@pytest.mark.parametrize("before", [None, OLD], ids=["new", "old"])
@pytest.mark.parametrize("at", range(len(EVERY_CALL)))
@pytest.mark.parametrize(
    "number",
    [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.ENOENT],
)
def test_a_fault_at_any_system_call_leaves_one_whole_file(tmp_path, before, at, number):
    target = tmp_path / "song.wav"
    if before:
        target.write_bytes(before)
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, at, raises(OSError(number, "injected")))
        with pytest.raises(StudioError) as caught:
            files.atomic_write(target, PIECES, durable=True)
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    assert caught.value.code == ("disk-full" if full else "not-writable")
    replaced = "replace" in EVERY_CALL[:at]
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"] * (replaced or bool(before))
    if target.exists():
        assert target.read_bytes() == (NEW if replaced else before)


@pytest.mark.parametrize("at", range(7))
@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError, GeneratorExit])
def test_what_stops_a_write_comes_through_and_leaves_no_file(tmp_path, at, stop):
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, at, raises(stop()))
        with pytest.raises(stop):
            files.atomic_write(tmp_path / "song.wav", PIECES, durable=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [1, 2, 3])
def test_the_rest_of_a_short_write_follows(tmp_path, at):
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, at, short if at != 2 else lambda call, *args: call(*args))
        files.atomic_write(tmp_path / "song.wav", PIECES)
    assert (tmp_path / "song.wav").read_bytes() == NEW


def test_a_disk_that_takes_nothing_more_is_full(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, 2, lambda *_: 0)
        with pytest.raises(StudioError, match="is full"):
            files.atomic_write(tmp_path / "song.wav", PIECES)
    assert list(tmp_path.iterdir()) == []


def test_a_file_larger_than_the_system_allows_is_a_full_disk(tmp_path):
    resource = pytest.importorskip("resource", reason="only Unix limits the size of files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(StudioError) as caught:
            files.atomic_write(tmp_path / "song.wav", NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == "disk-full"
    assert list(tmp_path.iterdir()) == []


def test_clean_up_that_fails_does_not_hide_the_first_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", raises(OSError(errno.ENOSPC, "full")))
    monkeypatch.setattr(files.os, "unlink", raises(OSError(errno.EROFS, "read-only")))
    with pytest.raises(StudioError) as caught:
        files.atomic_write(tmp_path / "song.wav", NEW)
    assert caught.value.code == "disk-full"


def test_an_error_of_the_content_comes_through_and_leaves_no_file(tmp_path):
    def pieces():
        yield NEW
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        files.atomic_write(tmp_path / "song.wav", pieces())
    assert list(tmp_path.iterdir()) == []


def test_text_bytes_pieces_and_files_are_written(tmp_path):
    target = tmp_path / "a.txt"
    for content, expected in (
        ("grün\n", "grün\n".encode()),
        (NEW, NEW),
        (iter(PIECES), NEW),
        (b"", b""),
        ((), b""),
    ):
        files.atomic_write(target, content)
        assert target.read_bytes() == expected
    source = tmp_path / "source"
    source.write_bytes(NEW)
    files.atomic_write(target, source)
    assert target.read_bytes() == NEW
    files.atomic_write(source, source)
    assert source.read_bytes() == NEW


def test_a_source_that_is_gone_is_named_as_such(tmp_path):
    with pytest.raises(StudioError) as caught:
        files.atomic_write(tmp_path / "a.wav", tmp_path / "gone.wav")
    assert (caught.value.code, caught.value.facts["name"]) == ("source-missing", "gone.wav")


@pytest.mark.parametrize("length", [1, 2, 5, 7, 8, 9, 18, 100, 250, 255])
def test_the_temporary_name_is_no_longer_than_the_name(tmp_path, length, monkeypatch):
    made = []

    def noted(path, *args, **kwargs):
        made.append(Path(path).name)
        return os_open(path, *args, **kwargs)

    os_open = os.open
    monkeypatch.setattr(files.os, "open", noted)
    target = tmp_path / ("x" * length)
    for _ in range(5):
        files.atomic_write(target, NEW)
    assert all(len(name) <= length for name in made)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_name_of_62_emoji_is_written(tmp_path):
    target = tmp_path / ("🎸" * 62 + ".wav")
    files.check_writable(target)
    files.atomic_write(target, NEW)
    assert target.read_bytes() == NEW


# Checking the folder before the work.


@pytest.mark.parametrize("name", ["song.wav", "x" * 250 + ".wav", "मेरा गाना.wav"])
def test_a_place_that_can_be_written_to_passes_and_stays_as_it_is(tmp_path, name):
    files.check_writable(tmp_path / name, 1000)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / name).write_bytes(OLD)
    files.check_writable(tmp_path / name, 1000)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [OLD]


def places(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "folder.wav").mkdir()
    (folder / "file").write_bytes(b"")
    os.mkfifo(folder / "pipe.wav")
    (folder / "loop").symlink_to(folder / "loop")
    return {
        "gone": (folder / "gone" / "a.wav", "the folder does not exist"),
        "below a file": (folder / "file" / "a.wav", "part of the path is not a folder"),
        "a folder": (folder / "folder.wav", "there is a folder of that name"),
        "a pipe": (folder / "pipe.wav", "the system refused it"),
        "a loop": (folder / "loop" / "a.wav", "the path is a loop of links"),
        "a long name": (folder / ("x" * 252 + ".wav"), "the file name is too long"),
        "a long name in bytes": (folder / ("🎸" * 63 + ".wav"), "the file name is too long"),
        "a long path": (folder / "/".join(["y" * 200] * 25) / "a.wav", "the file name is too long"),
        "a null byte": (folder / "a\0b.wav", "the system refused it"),
    }


@pytest.mark.parametrize(
    "case",
    [
        *("gone", "below a file", "a folder", "a pipe", "a loop", "a long name"),
        *("a long name in bytes", "a long path", "a null byte"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_with_the_reason(tmp_path, case):
    target, problem = places(tmp_path)[case]
    with pytest.raises(StudioError) as caught:
        files.check_writable(target)
    assert caught.value.code == "not-writable"
    assert caught.value.facts["problem"] == problem
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EROFS, "not-writable"), (errno.EACCES, "not-writable"), (errno.ENOSPC, "disk-full")],
)
@pytest.mark.parametrize("call", ["open", "write", "close"])
def test_a_probe_that_fails_says_why_and_leaves_nothing(tmp_path, monkeypatch, number, code, call):
    Faults(monkeypatch, ("open", "write", "close").index(call), raises(OSError(number, "no")))
    with pytest.raises(StudioError) as caught:
        files.check_writable(tmp_path / "song.wav")
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_a_file_larger_than_the_free_space_is_disk_full(tmp_path):
    with pytest.raises(StudioError) as caught:
        files.check_writable(tmp_path / "song.wav", 1 << 60)
    assert caught.value.code == "disk-full"
    assert "1099511627776 MB" in caught.value.action


def test_the_error_number_decides_and_not_the_free_space(tmp_path):
    error = files.write_error(tmp_path / "a", OSError(errno.EACCES, "no"), 1 << 62)
    assert error.code == "not-writable"
    assert files.write_error(tmp_path / "a", OSError(errno.EDQUOT, "no"), 1).code == "disk-full"
    short_write = OSError("1048576 requested and 4096 written")
    assert files.write_error(tmp_path / "a", short_write, 1).code == "disk-full"


def test_the_advice_depends_on_the_folder(tmp_path):
    problem = OSError(errno.EROFS, "no")
    private = files.private_folder() / "job" / "a.wav"
    assert "TMPDIR" in files.write_error(private, problem, 1).action
    assert "--out" in files.write_error(tmp_path / "a.wav", problem, 1).action
    assert "this folder" in files.write_error(Path("a.wav"), problem, 1).message


def test_staged_files_appear_together_or_not_at_all(tmp_path):
    with files.staging(tmp_path) as staged:
        (staged / "a").write_bytes(OLD)
        (staged / "b").write_bytes(NEW)
        assert not (tmp_path / "a").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(FileNotFoundError), files.staging(tmp_path) as staged:
        (staged / "c").write_bytes(OLD + (staged / "gone").read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("at", range(3))
def test_a_move_that_fails_takes_the_files_before_it_back(tmp_path, at):
    (tmp_path / "a").write_bytes(OLD)
    moves = [os.replace] * at + [raises(OSError(errno.EIO, "no"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "replace", lambda *paths: moves.pop(0)(*paths))
        with pytest.raises(OSError, match="no"), files.staging(tmp_path) as staged:
            _ = [(staged / name).write_bytes(NEW) for name in "abc"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == (NEW if at else OLD)


# Names.

RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")

names = st.text(
    st.sampled_from('ab.-_ /\\:*?"<>|\n\0\x1b🎸कि\u093f\u0301\u200d\u202e\U0001f3fd')
    | st.characters(),
    max_size=300,
)


@settings(max_examples=100, deadline=None)
@given(names)
@example("con")
@example("CON.wav")
@example("con" + "." * 300)
@example("..")
@example("\ud800.wav")
def test_safe_names_are_accepted_everywhere(tmp_path_factory, name):
    safe = files.safe_name(name)
    assert 0 < len(safe.encode()) <= files.MAX_NAME_BYTES
    assert not set(safe) & set('/\\:*?"<>|')
    assert not {unicodedata.category(c) for c in safe} & {"Cc", "Cs", "Zl", "Zp"}
    assert "\u202e" not in safe
    assert safe[0] not in ". "
    assert safe[-1] not in ". "
    assert not RESERVED.fullmatch(safe)
    assert files.safe_name(safe) == safe
    folder = tmp_path_factory.getbasetemp() / "names"
    folder.mkdir(exist_ok=True)
    files.atomic_write(folder / safe, b"x")
    assert [path.name for path in folder.iterdir()] == [safe]
    (folder / safe).unlink()


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("My song (1).flac", "My song (1).flac"),
        ("मेरा गाना.wav", "मेरा गाना.wav"),
        ("เพลงของฉัน.mp3", "เพลงของฉัน.mp3"),
        ("cafe\u0301.wav", "café.wav"),
        ("👩\u200d🚀 song.wav", "👩\u200d🚀 song.wav"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("C:\\songs\\a.wav", "C__songs_a.wav"),
        ("a\nb\x1b[31m.wav", "a_b_[31m.wav"),
        (".hidden.wav", "hidden.wav"),
        ("nul.wav", "_nul.wav"),
        ("  ", "song"),
        ("", "song"),
    ],
)
def test_safe_names_stay_close_to_the_original(name, safe):
    assert files.safe_name(name) == safe


def test_a_long_name_keeps_its_suffix_and_whole_characters():
    for letter in ("x", "🎸", "कि", "👩\u200d🚀"):
        safe = files.safe_name(letter * 200 + ".flac")
        assert safe.endswith(".flac")
        assert 180 <= len(safe.encode()) <= 200
        assert not safe.removesuffix(".flac").replace(letter, "")


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("warm lofi piano, vinyl crackle", "warm-lofi-piano-vinyl-crackle"),
        ("Rock & Roll: 80's!", "rock-roll-80-s"),
        ("एक धीमी राग, सितार", "एक-धीमी-राग-सितार"),
        ("เพลงช้าๆ", "เพลงช้าๆ"),
        ("🎸🔥 metal", "🎸🔥-metal"),
        ("🎸", "🎸"),
        ("!!! ...", "generate"),
        ("a" * 60, "a" * 40),
        ("../etc/passwd", "etc-passwd"),
        ("x\0y\nz", "x-y-z"),
        ("_under_", "under"),
    ],
)
def test_names_from_prompts_are_their_words(prompt, name):
    assert files.name_from_text(prompt, "generate") == name


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="ascii"), max_size=80))
def test_names_from_plain_prompts_are_those_of_older_versions(prompt):
    older = "-".join(re.findall(r"\w+", prompt.lower()))[:40].strip("-_") or "generate"
    name = files.name_from_text(prompt, "generate")
    assert name.removeprefix("_") == older
