"""What the server answers over HTTP besides Gradio's own API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import gradio as gr
import httpx
import pytest
from fake_studio import FakeStudio

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


def test_a_deep_link_is_left_to_gradio(http: httpx.Client):
    assert "etag" not in http.head("/?deep_link=none").headers
