"""HTTP routes for what nodes show of their widgets, so that the arithmetic has one home.

The Cache Config shows the plan of its configuration, and the Prompt Schedule when its prompts start.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

from ..packforcing.config import CacheConfig, FrameSize, Length
from ..packforcing.errors import PackForcingError
from ..packforcing.generate.plan import plan, plan_text
from ..packforcing.generate.story import parse_story, story_text, times_text
from ..packforcing.known_models import MODELS, VAE_DIMS
from .live import register_live

log = logging.getLogger(__name__)

PLAN_PATH, STORY_PATH = "/packforcing/plan", "/packforcing/story"


def planned(query: dict[str, str]) -> dict[str, Any]:
    """The answer to a query: {"text", "plan"}, or {"error"} with the sentence that says what is wrong."""
    try:
        types = {field.name: type(field.default) for field in fields(CacheConfig)}
        types["rope_adjustment"] = lambda text: text.lower() == "true"  # bool("false") is true
        config = CacheConfig(**{name: types[name](value) for name, value in query.items() if name in types})
        size = FrameSize(int(query.get("width", 832)), int(query.get("height", 480)))
        name = query.get("model", "wan2.1-1.3b")
        if name not in MODELS:
            raise PackForcingError(f"There is no model '{name}' to plan for: choose one of {', '.join(MODELS)}.")
        seconds, fps = float(query.get("seconds", 120)), float(query.get("fps", 16))
        result = plan(MODELS[name], config, size, seconds, fps, vae_dim=VAE_DIMS[name])
    except ValueError as error:  # PackForcingError is one; a number that does not parse is another
        return {"error": str(error)}
    return {"text": plan_text(result, name), "plan": result.as_dict()}


def story_times(query: dict[str, str]) -> dict[str, str]:
    """The answer to a story's text and the video that it is for: {"text"}, or {"error"} as above."""
    try:
        prompts = parse_story(query.get("text", ""))
        frames = int(query.get("block_frames", CacheConfig().block_frames))
        length = Length(float(query["seconds"]), float(query.get("fps", 16)), frames) if "seconds" in query else None
        return {"text": times_text(prompts, length) if length else story_text(prompts)}
    except ValueError as error:
        return {"error": str(error)}


def register() -> None:
    """Adds the routes to ComfyUI's server, when there is one."""
    from aiohttp import web
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None:
        log.debug("no server: the nodes show neither plan nor times")
        return

    register_live(server)

    @server.routes.get(PLAN_PATH)
    async def plan_route(request: web.Request) -> web.Response:
        return web.json_response(planned(dict(request.query)))

    @server.routes.post(STORY_PATH)  # a story may be longer than an address
    async def story_route(request: web.Request) -> web.Response:
        return web.json_response(story_times({name: str(value) for name, value in (await request.post()).items()}))
