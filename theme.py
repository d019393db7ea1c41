"""The palette, the Gradio theme and the style sheet: black, white and greys only."""

from __future__ import annotations

import base64
import inspect
from pathlib import Path
from urllib.parse import quote

import gradio as gr
from gradio.themes.utils.colors import Color
from gradio.themes.utils.sizes import Size

import tooltips

ASSETS = Path(__file__).resolve().parent / "assets"

GROUND, SURFACE, RAISED = "#0A0A0A", "#141414", "#1F1F1F"
LINE, EDGE = "#2A2A2A", "#666666"
INK, SOFT, DIM = "#FFFFFF", "#C8C8C8", "#A0A0A0"
"""Surfaces from dark to light; lines, `EDGE` around what can be pressed; text from bright to dim.
There are no other colours."""

FONTS = (
    ("Inter", 400, "Inter-Regular.woff2"),
    ("Inter", 600, "Inter-SemiBold.woff2"),
    ("JetBrains Mono", 400, "JetBrainsMono-Regular.woff2"),
)

GREYS = Color(
    name="ink",
    c50=INK,
    c100="#F2F2F2",
    c200="#D9D9D9",
    c300=SOFT,
    c400=DIM,
    c500="#8A8A8A",
    c600="#5A5A5A",
    c700="#333333",
    c800=RAISED,
    c900=SURFACE,
    c950=GROUND,
)

CORNERS = Size(name="six", xxs="2px", xs="3px", sm="4px", md="6px", lg="6px", xl="6px", xxl="6px")

TICK = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16' fill='none'"
    f" stroke='{GROUND}' stroke-width='2.5'><path d='M3.5 8.5l3 3 6-7'/></svg>"
)
"""The tick of a checkbox: dark, since a ticked box is white."""


VARIABLES: dict[str, str] = {
    "body_background_fill": GROUND,
    "body_text_color": INK,
    "body_text_color_subdued": DIM,
    "background_fill_primary": GROUND,
    "background_fill_secondary": SURFACE,
    "border_color_primary": LINE,
    "border_color_accent": INK,
    "border_color_accent_subdued": EDGE,
    "color_accent_soft": RAISED,
    "link_text_color": INK,
    "link_text_color_hover": INK,
    "link_text_color_visited": INK,
    "link_text_color_active": INK,
    "code_background_fill": SURFACE,
    "block_background_fill": SURFACE,
    "block_border_color": LINE,
    "block_border_width": "0px",
    "block_info_text_color": DIM,
    "block_label_background_fill": SURFACE,
    "block_label_border_color": LINE,
    "block_label_text_color": SOFT,
    "block_title_text_color": INK,
    "block_title_text_weight": "600",
    "block_shadow": "none",
    "panel_background_fill": GROUND,
    "panel_border_color": LINE,
    "accordion_text_color": INK,
    "error_background_fill": RAISED,
    "error_border_color": INK,
    "error_text_color": INK,
    "error_icon_color": INK,
    "input_background_fill": GROUND,
    "input_background_fill_focus": GROUND,
    "input_background_fill_hover": GROUND,
    "input_border_color": EDGE,
    "input_border_color_focus": INK,
    "input_border_color_hover": SOFT,
    "input_border_width": "1px",
    "input_placeholder_color": "#8A8A8A",
    "input_shadow": "none",
    "input_shadow_focus": f"0 0 0 1px {INK}",
    "loader_color": INK,
    "slider_color": INK,
    "stat_background_fill": INK,
    "shadow_drop": "none",
    "shadow_drop_lg": "none",
    "shadow_inset": "none",
    "shadow_spread": "0",
    "checkbox_background_color": GROUND,
    "checkbox_background_color_hover": GROUND,
    "checkbox_background_color_focus": GROUND,
    "checkbox_background_color_selected": INK,
    "checkbox_border_color": EDGE,
    "checkbox_border_color_hover": INK,
    "checkbox_border_color_focus": INK,
    "checkbox_border_color_selected": INK,
    "checkbox_check": f'url("data:image/svg+xml,{quote(TICK)}")',
    "checkbox_shadow": "none",
    "checkbox_label_background_fill": GROUND,
    "checkbox_label_background_fill_hover": RAISED,
    "checkbox_label_background_fill_selected": INK,
    "checkbox_label_border_width": "1px",
    "checkbox_label_border_color": EDGE,
    "checkbox_label_border_color_hover": INK,
    "checkbox_label_border_color_selected": INK,
    "checkbox_label_text_color": INK,
    "checkbox_label_text_color_selected": GROUND,
    "checkbox_label_text_weight": "400",
    "checkbox_label_shadow": "none",
    "table_border_color": LINE,
    "table_even_background_fill": SURFACE,
    "table_odd_background_fill": SURFACE,
    "table_row_focus": RAISED,
    "table_text_color": INK,
    **{
        f"button_{variant}_{part}": value
        for variant, (fill, over, ink, edge) in {
            "primary": (INK, "#E0E0E0", GROUND, INK),
            "secondary": (GROUND, RAISED, INK, EDGE),
            "cancel": (GROUND, RAISED, INK, EDGE),
        }.items()
        for part, value in {
            "background_fill": fill,
            "background_fill_hover": over,
            "text_color": ink,
            "text_color_hover": ink,
            "border_color": edge,
            "border_color_hover": edge,
            "shadow": "none",
            "shadow_hover": "none",
            "shadow_active": "none",
        }.items()
    },
    **{f"button_{size}_text_weight": "600" for size in ("large", "medium", "small")},
}
"""Theme variables. Each is set for light and dark mode alike, so that they cannot differ."""


class StudioTheme(gr.themes.Base):
    """A theme with a style sheet of its own, sent once.

    Gradio 6.31 sends `custom_css` three times: as it is, and as a variable for either mode. And
    `launch(css=)` prefixes the rules inside @media, where `:root` then never matches.
    """

    def _get_theme_css(self) -> str:
        parts = (_fonts(), _tokens(), (ASSETS / "studio.css").read_text("utf-8"))
        return "\n".join((super()._get_theme_css(), "", *parts))


def theme() -> StudioTheme:
    """The Gradio theme with fonts, palette and style sheet in its own CSS."""
    theme = StudioTheme(
        primary_hue=GREYS,
        secondary_hue=GREYS,
        neutral_hue=GREYS,
        radius_size=CORNERS,
        spacing_size=gr.themes.sizes.spacing_md,
        text_size=gr.themes.sizes.text_md,
        font=["Inter", "system-ui", "sans-serif"],
        font_mono=["JetBrains Mono", "ui-monospace", "monospace"],
    )
    theme.set(color_accent=INK, **VARIABLES, **_dark(VARIABLES))
    return theme


def _dark(variables: dict[str, str]) -> dict[str, str]:
    """The same values for the dark variants that Gradio knows."""
    known = inspect.signature(gr.themes.Base.set).parameters
    return {f"{name}_dark": v for name, v in variables.items() if f"{name}_dark" in known}


def _fonts() -> str:
    """The fonts inside the style sheet: no request, no path, no flash of another font."""
    rule = (
        "@font-face{{font-family:'{0}';font-weight:{1};font-display:block;"
        "src:url(data:font/woff2;base64,{2}) format('woff2')}}"
    )
    return "\n".join(
        rule.format(
            family, weight, base64.b64encode((ASSETS / "fonts" / file).read_bytes()).decode()
        )
        for family, weight, file in FONTS
    )


def _tokens() -> str:
    """The palette and each tab's icon as custom properties for `studio.css`."""
    palette = {
        "ground": GROUND,
        "surface": SURFACE,
        "raised": RAISED,
        "line": LINE,
        "edge": EDGE,
        "ink": INK,
        "soft": SOFT,
        "dim": DIM,
    }
    palette["choose"] = f"'{tooltips.CHOOSE}'"
    root = "".join(f"--{name}:{value};" for name, value in palette.items())
    icons = "\n".join(
        f'#t-{icon.stem}-button{{--icon:url("data:image/svg+xml,{quote(icon.read_text("utf-8"))}")}}'
        for icon in sorted((ASSETS / "icons").glob("*.svg"))
    )
    return f":root,.dark{{{root}}}\n{icons}"
