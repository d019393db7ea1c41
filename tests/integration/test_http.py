"""What the server answers over HTTP besides Gradio's own API."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import fake_studio
import gradio as gr
import httpx
import openai
import pytest
from conftest import read_sound
from fake_studio import FakeStudio
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from audio.settings import read_settings
from web.api import REQUESTS
from web.openai_api import KINDS
from web.page import build, launch_options
from web.page_cache import ADDRESSES_KEPT, CONFIG_MARK, UNUSED_BY_THE_PAGE


class Served(NamedTuple):
    studio: FakeStudio
    url: str
    demo: gr.Blocks


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("page")))
        studio = FakeStudio(folder=tmp_path_factory.mktemp("takes"))
        demo = build(studio)
        options = {**launch_options(), "allowed_paths": [str(studio.folder)]}
        _, url, _ = demo.queue(max_size=64).launch(
            server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **options
        )
        yield Served(studio, url, demo)
        demo.close()


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


# ---- the page from memory ----


def sent(response: httpx.Response) -> int:
    """Bytes on the wire, headers aside."""
    assert response.status_code == 200
    return int(response.headers["content-length"])


def config_of(page: bytes) -> dict:
    text = page.partition(CONFIG_MARK)[2].decode()
    return json.JSONDecoder().raw_decode(text)[0]


@pytest.mark.parametrize(("accepted", "encoding"), [("gzip, br", "br"), ("gzip;q=0.5", "gzip")])
def test_a_first_view_is_small_and_compressed(http: httpx.Client, accepted: str, encoding: str):
    headers = {"accept-encoding": accepted}
    ours = [http.get(path, headers=headers) for path in ("/", "/theme.css")]
    assert {response.headers["content-encoding"] for response in ours} == {encoding}
    assert sum(map(sent, ours)) < 200_000
    assert len(ours[0].content) < 800_000, "as the browser parses it"


def test_a_page_known_to_the_browser_is_not_sent_again(http: httpx.Client):
    etag = http.get("/").headers["etag"]
    for known in (etag, f'"other", {etag}', "*"):
        again = http.get("/", headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
    assert http.get("/", headers={"if-none-match": 'W/"other"'}).status_code == 200


def test_views_at_once_make_the_page_once(http: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    made = []
    original = gr.routes.templates.TemplateResponse

    def count(*args, **kwargs):
        made.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(gr.routes.templates, "TemplateResponse", count)
    headers = {"x-forwarded-host": "once.example"}
    with ThreadPoolExecutor(8) as pool:
        pages = [*pool.map(lambda n: http.get(f"/?tab={n}", headers=headers).content, range(8))]
    assert len(made) == 1
    assert len(set(pages)) == 1


def test_each_address_gets_a_page_with_its_own_links(http: httpx.Client):
    for host, path in (("one.example", "/"), ("two.example", "/config")):
        headers = {"x-forwarded-host": host, "x-forwarded-proto": "https"}
        answer = http.get(path, headers=headers)
        config = answer.json() if path == "/config" else config_of(answer.content)
        assert config["root"] == f"https://{host}"


def test_invented_addresses_do_not_fill_the_memory(served: Served, http: httpx.Client):
    (cache,) = caches(served)
    for number in range(3):
        http.get("/theme.css", headers={"host": f"h{number}.example"})
    key = next(reversed(cache._pages))
    for number in range(ADDRESSES_KEPT):
        cache._pages[("/", str(number))] = cache._pages[key]
    http.get("/theme.css", headers={"host": "one-more.example"})
    assert len(cache._pages) == ADDRESSES_KEPT
    cache._pages.clear()


def caches(served: Served) -> list:
    found, layer = [], served.demo.app.middleware_stack
    while layer is not None:
        if type(layer).__name__ == "PageCache":
            found.append(layer)
        layer = getattr(layer, "app", None)
    return found


def test_the_page_leaves_out_only_what_clients_of_the_api_read(http: httpx.Client):
    shown, full = config_of(http.get("/").content), http.get("/config").json()
    assert len(shown["components"]) == len(full["components"])
    for ours, theirs in zip(shown["components"], full["components"], strict=True):
        assert ours == {k: v for k, v in theirs.items() if k not in UNUSED_BY_THE_PAGE}
    assert any("api_info" in component for component in full["components"])


def test_each_script_is_sent_once(http: httpx.Client):
    page = http.get("/").text
    for line in ("The preview of an uploaded file", "Copy a link with the settings"):
        assert page.count(line) == 1


def test_clients_without_compression_and_head_requests_are_answered(http: httpx.Client):
    plain = http.get("/", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == http.get("/", headers={"accept-encoding": "br"}).content
    head = http.head("/", headers={"accept-encoding": "br"})
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["etag"] == plain.headers["etag"]


def test_named_files_of_the_bundle_may_be_kept_for_good(http: httpx.Client):
    script = http.get("/").text.partition('crossorigin src="./')[2].partition('"')[0]
    for accepted in ("br", "identity"):
        answer = http.get(f"/{script}", headers={"accept-encoding": accepted})
        assert answer.status_code == 200
        assert answer.text.startswith(("const", "import", "var", "(function", "let"))
    packed = http.get(f"/{script}", headers={"accept-encoding": "br"})
    assert packed.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert packed.headers["content-encoding"] == "br"
    assert http.get("/assets/none.js").status_code == 404


def test_the_first_question_at_the_start_does_not_wait_for_the_page(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    original, begun = gr.routes.templates.TemplateResponse, threading.Event()

    def slow(*args, **kwargs):
        begun.set()
        time.sleep(0.5)
        return original(*args, **kwargs)

    monkeypatch.setattr(gr.routes.templates, "TemplateResponse", slow)
    headers = {"x-forwarded-host": "start.example"}
    head = http.head("/", headers=headers)
    assert head.headers["content-type"].startswith("text/html")
    assert "etag" not in head.headers, "it is not made yet"
    assert begun.wait(20), "but begun"
    assert http.get("/", headers=headers).headers["etag"]


def test_a_deep_link_is_left_to_gradio(http: httpx.Client):
    assert "etag" not in http.head("/?deep_link=none").headers


# ---- OpenAI's manner ----

SONG = {"prompt": "warm lofi piano", "duration_s": 5, "seed": 3}


@pytest.fixture(autouse=True)
def quiet_studio(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key from the environment, and no calls left from other tests."""
    monkeypatch.delenv("ACE_API_KEY", raising=False)
    request.getfixturevalue("served").studio.reset()


def wait_for(done, timeout_s: float = 20) -> None:
    until = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def openai_client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="any", base_url=f"{served.url}v1", max_retries=2) as client:
        yield client


def test_openais_client_lists_the_model_and_gets_a_song(
    served: Served, openai_client: openai.OpenAI
):
    assert [model.id for model in openai_client.models.list()] == ["mini"]
    assert openai_client.models.retrieve("mini").owned_by == "ace-step"
    sound = openai_client.audio.speech.create(
        model="mini",
        voice="de",
        input="[Verse]\nDer Regen kennt mich",
        instructions="waltz",
        response_format="wav",
        extra_body={"duration_s": 5, "seed": 3},
    )
    assert sound.content[:4] == b"RIFF"
    song = served.studio.requests[-1]
    assert (song.prompt, song.lyrics) == ("waltz", "[Verse]\nDer Regen kennt mich")
    assert (song.vocal_language, song.duration_s, song.seed) == ("de", 5, 3)
    wait_for(lambda: served.studio.left)


@pytest.mark.parametrize(("format_", "kind"), KINDS.items())
def test_the_song_comes_in_the_format_asked_for(served, http, format_: str, kind: str):
    answer = http.post("/v1/audio/music", json={**SONG, "response_format": format_})
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
    assert answer.headers["content-disposition"] == f'attachment; filename="song-3.{format_}"'
    exports = [r.format for r in served.studio.requests if r.mode == "export"]
    assert exports == ([] if format_ == "wav" else [format_])
    assert len(served.studio.left) == 1, "nothing is kept for the caller"


def test_a_stream_tells_progress_and_ends_with_the_sound(http: httpx.Client):
    body = {**SONG, "duration_s": 10, "stream": True, "response_format": "wav"}
    with http.stream("POST", "/v1/audio/music", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [*answer.iter_lines()]
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    kinds = [event["type"] for event in events]
    assert list(dict.fromkeys(kinds)) == ["progress", "speech.audio.delta", "speech.audio.done"]
    assert {"stage", "step", "steps", "elapsed_s", "left_s"} <= set(events[1])
    assert kinds.count("speech.audio.delta") > 1
    sound = base64.b64decode("".join(e["audio"] for e in events if "audio" in e))
    assert sound[:4] == b"RIFF"
    assert len(sound) == 44 + 10 * 48_000 * 6
    assert events[-1]["take"]["request"]["seed"] == 3
    assert "path" not in events[-1]["take"]


def error_of(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "action"}
    assert error["message"].endswith(error["action"])
    assert answer.headers["x-should-retry"] == "false"
    return error


@pytest.mark.parametrize(
    ("body", "code", "named"),
    [
        ({**SONG, "tempo": 90}, "unknown-field", "tempo"),
        ({**SONG, "reference": "/etc/passwd"}, "unknown-field", "reference"),
        ({**SONG, "duration_s": 9999}, "value-out-of-range", "Length"),
        ({**SONG, "input": "waltz"}, "value-out-of-range", "input"),
        ({**SONG, "response_format": "ogg"}, "value-out-of-range", "response_format"),
        ({**SONG, "stream": 1}, "value-out-of-range", "stream"),
        ({"input": " "}, "prompt-empty", "style"),
        ([SONG], "value-out-of-range", "body"),
    ],
)
def test_a_wrong_field_is_refused_by_name(served, http, body: object, code: str, named: str):
    error = error_of(http.post("/v1/audio/music", json=body), 400)
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert named in error["message"]
    assert not served.studio.requests


def test_wrong_bodies_models_voices_and_paths_are_refused(http: httpx.Client):
    text = {"content-type": "text/plain"}
    answer = http.post("/v1/audio/music", content=json.dumps(SONG), headers=text)
    assert "application/json" in error_of(answer, 400)["message"], "no web page can send it unasked"
    big = {**SONG, "lyrics": "la " * 200_000}
    assert "larger" in error_of(http.post("/v1/audio/music", json=big), 400)["message"]
    other = {**SONG, "model": "tts-1"}
    assert error_of(http.post("/v1/audio/music", json=other), 404)["code"] == "model-not-loaded"
    voice = {"input": "la", "instructions": "x", "voice": "alloy"}
    assert "voice" in error_of(http.post("/v1/audio/speech", json=voice), 400)["message"]
    assert error_of(http.get("/v1/chat/completions"), 404)["code"] == "endpoint-unknown"


def test_a_job_that_fails_is_answered_in_the_envelope(served, http, openai_client):
    failing = {**SONG, "prompt": "fail"}
    error = error_of(http.post("/v1/audio/music", json=failing), 500)
    assert (error["code"], error["type"]) == ("out-of-memory", "server_error")
    assert error["action"].startswith("Shorten")
    streamed = http.post("/v1/audio/music", json={**failing, "stream": True}).text
    assert streamed.splitlines()[-3] == "event: error"
    served.studio.reset()
    with pytest.raises(openai.InternalServerError) as caught:
        openai_client.audio.speech.create(
            model="mini", voice="auto", input="x", instructions="fail"
        )
    assert caught.value.code == "out-of-memory"
    assert len(served.studio.requests) == 1, "the client does not make the song again"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_job(served, http, stream: bool):
    body = {**SONG, "prompt": "slow", "stream": stream}
    if stream:
        with http.stream("POST", "/v1/audio/music", json=body) as answer:
            assert "progress" in next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/audio/music", json=body, timeout=0.5)
    # A slow song takes 8 s: it was told to stop.
    wait_for(lambda: served.studio.left, 4)


def test_the_key_is_asked_for_when_it_is_set(http: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACE_API_KEY", "geheim-ü")
    for header in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic geheim-ü".encode()},
    ):
        error = error_of(http.post("/v1/audio/music", json=SONG, headers=header), 401)
        assert (error["code"], error["type"]) == ("api-key-wrong", "authentication_error")
    right = {"authorization": "Bearer geheim-ü".encode()}
    assert http.get("/v1/models", headers=right).status_code == 200
    assert http.get("/").status_code == 200, "it guards /v1 alone"


@pytest.mark.slow
def test_curl_gets_the_song_of_the_embedded_model(request: pytest.FixtureRequest, tmp_path: Path):
    url = request.getfixturevalue("_real")
    path = tmp_path / "song.flac"
    body = {**SONG, "inference_steps": 2, "response_format": "flac"}
    command = ["curl", "-sSf", "--noproxy", "*", f"{url}v1/audio/music", "-o", str(path)]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    subprocess.run(command, check=True, timeout=200)
    made = read_settings(path)
    assert (made["request"]["seed"], made["request"]["inference_steps"]) == (3, 2)
    assert read_sound(path).shape == (2, 5 * 48_000)


# ---- MCP ----

Session = TypeVar("Session")


def with_mcp(url: str, use: Callable[[ClientSession], Awaitable[Session]]) -> Session:
    """What `use` returns for a session of the official client."""

    async def run() -> Session:
        async with (
            streamable_http_client(f"{url}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            return await use(session)

    return asyncio.run(run())


def test_mcp_has_a_described_tool_for_every_request(served: Served):
    tools = {tool.name: tool for tool in with_mcp(served.url, ClientSession.list_tools).tools}
    assert set(tools) == set(REQUESTS)
    for name, request in REQUESTS.items():
        assert tools[name].description.startswith(request.__doc__.strip().split("\n")[0])
        fields = tools[name].inputSchema["properties"]
        assert list(fields) == [param.name for param in request.params()]
        assert all(field["description"] for field in fields.values())


def test_mcp_makes_a_song_with_progress_and_gives_its_address(
    served: Served, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fake_studio, "SONG", (("Denoising", 5),))
    told: list[str] = []

    async def note(_: float, __: float | None, message: str | None) -> None:
        told.append(message or "")

    async def make(session: ClientSession):
        return await session.call_tool(
            "generate", {**SONG, "prompt": "slow"}, progress_callback=note
        )

    answer = with_mcp(served.url, make)
    assert not answer.isError
    url, take = (part.text for part in answer.content)
    assert http.get(url).content[:4] == b"RIFF"
    assert "'seed': 3" in take
    assert any("Denoising" in message and "of 5" in message for message in told)


def test_mcp_names_what_is_wrong(served: Served):
    async def make(session: ClientSession):
        return await session.call_tool("generate", {**SONG, "prompt": "fail"})

    answer = with_mcp(served.url, make)
    assert answer.isError
    assert "There was not enough memory" in answer.content[0].text
