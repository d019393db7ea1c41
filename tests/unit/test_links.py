"""Share links: which settings they restore, and which links are rejected."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import StudioError
from core.requests import MODES, Generate
from web import restore


def _take(request: Any) -> Any:
    return SimpleNamespace(mode=request.mode, to_request=lambda: request)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_link_restores_every_value_and_contains_no_path(data: st.DataObject):
    mode = data.draw(st.sampled_from([*MODES]))
    fields: dict[str, Any] = {"prompt": data.draw(st.text(min_size=1, max_size=40)) + "x"}
    fields |= {"lyrics": data.draw(st.text(max_size=200))}
    for param in MODES[mode].params():
        if param.choices:
            fields[param.name] = data.draw(st.sampled_from(param.choices))
        elif param.type is bool:
            fields[param.name] = data.draw(st.booleans())
        elif param.type in (int, float) and param.name not in (
            "cfg_interval_end",
            "end_s",
            "start_s",
        ):
            whole = st.integers(int(np.ceil(param.low)), int(param.high))
            fine = st.floats(param.low, param.high, allow_nan=False)
            fields[param.name] = data.draw(whole if param.type is int else fine)
    fields |= {"cfg_interval_start": 0.0, "n_min": 0.0, "after_s": 3.5}
    if mode != "generate":
        fields["source"] = "/home/somebody/secret name.wav"
    fields = {k: v for k, v in fields.items() if k in MODES[mode].model_fields}
    request = MODES[mode].of(fields)
    link = restore.link_to(_take(request))
    assert "secret" not in link
    assert "#" not in link.partition("#")[0]
    found = restore.read_link(link)
    assert found is not None
    restored, values, files = found
    expected = request.model_dump(mode="json")
    assert restored == mode
    assert values == {name: expected[name] for name in values}
    assert {*expected} - {*values} <= {"source", "reference", "adapters"}
    assert files == (("source",) if mode != "generate" else ())


def test_longest_lyrics_fit_into_a_link():
    request = Generate.of({"prompt": "x", "lyrics": "歌" * 4096})
    link = restore.link_to(_take(request))
    assert restore.read_link(link)[1]["lyrics"] == "歌" * 4096
    assert len(link.partition("#")[0]) < 20, "a fragment is never sent to a server"


@pytest.mark.parametrize("link", ["", "?tab=edit", "?tab=lyrics", "#studio", "?__theme=dark#"])
def test_link_without_settings_changes_nothing(link: str):
    assert restore.read_link(link) is None


HOSTILE = {
    "?tab=extend#source=/etc/passwd": "it names a file",
    "?tab=cover#files=/etc/passwd": "it names a file",
    "#adapters=/etc/passwd": "it names a file",
    "#prompt=a&prompt=b": "it sets a parameter twice",
    "#prompt=a&tempo=3": "'tempo' is not a setting of generate",
    "#prompt=a&duration_s=999": "Length must be a number from 5 to 600 s, not '999'",
    "#prompt=": "The style is empty",
    "?tab=root&prompt=a": "there are no settings for 'root'",
    "?tab=lyrics&brief=a": "there are no settings for 'lyrics'",
    "#prompt=a&bpm=%ff": "it is damaged",
    "#prompt=a&&&bpm": "it is damaged",
    "#" + "&".join(f"a{i}=1" for i in range(200)): "it is damaged",
    "#prompt=" + "a" * 200_000: "it is too long",
    "#prompt=a&mode=edit": "'mode' is not a setting of generate",
}


@pytest.mark.parametrize(("link", "message"), HOSTILE.items(), ids=range(len(HOSTILE)))
def test_invalid_link_is_rejected_with_a_reason(link: str, message: str):
    with pytest.raises(StudioError, match="settings in the link cannot be used") as caught:
        restore.read_link(link)
    assert message in caught.value.message
    assert "/etc" not in caught.value.message
