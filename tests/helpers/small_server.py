"""A small server with vLLM's routes, whose every answer is computed by a Hugging Face model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

Reply = tuple[int, dict[str, Any]]


class SmallServer:
    """Serves the model in a folder on 127.0.0.1, as a thread of the test.

    Args:
        model: Folder of the model.
        key: What clients must send; None = nothing.
    """

    def __init__(self, model: str, key: str | None = None) -> None:
        self.model, self.key = model, key
        self.turn, self._lock = Lock(), Lock()
        self.requests: list[tuple[str, dict[str, Any]]] = []  # route and body, of requests that were let in
        self.change: Callable[[str, Any], Any] | None = None  # what becomes of a reply, by route
        self.failures: Iterator[int | None] = iter(())  # next requests' statuses: None = answer, 0 = cut the connection
        self.start()

    def start(self, port: int = 0) -> None:
        """Loads the model; what was pushed to an earlier run is forgotten."""
        self.forget()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"server_of": self}))
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def restart(self) -> None:
        self.stop()
        self.start(self.port)

    def forget(self) -> None:
        """Goes back to what it was started with, as a restart does."""
        self._models: dict[str, Any] = {"base": AutoModelForCausalLM.from_pretrained(self.model).eval()}

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that it holds."""
        return [name for name in self._models if name != "base"]

    def bodies(self, route: str) -> list[dict[str, Any]]:
        """What was sent to a route."""
        return [body for path, body in self.requests if path == route]

    def reply(self, route: str, body: dict[str, Any]) -> Reply:
        self.requests.append((route, body))
        with self._lock:
            match route:
                case "/v1/models":
                    cards = [
                        {"id": "base", "parent": None},
                        *({"id": name, "parent": "base"} for name in self.adapters),
                    ]
                    return 200, {"data": cards}
                case "/v1/load_lora_adapter":
                    return self._load(body["lora_name"], body["lora_path"])
                case "/v1/unload_lora_adapter":
                    found = self._models.pop(body["lora_name"], None)
                    return (200, {}) if found else (404, {"error": "cannot be found"})
                case "/collective_rpc":
                    assert body["method"] == "reload_weights"
                    folder = body["kwargs"]["weights_path"]
                    if not Path(folder).exists():
                        return 500, {"error": "reload_weights failed"}
                    self._models["base"] = AutoModelForCausalLM.from_pretrained(folder).eval()
                    return 200, {}
                case "/reset_prefix_cache":
                    return 200, {}
                case "/v1/completions":
                    if body["model"] not in self._models:
                        return 404, {"error": f"The model `{body['model']}` does not exist."}
                    return 200, {"choices": [self._choice(body, index) for index in range(body["n"])]}
        return 404, {"detail": "Not Found"}

    def _load(self, name: str, folder: str) -> Reply:
        if name in self._models:
            return 400, {"error": f"The lora adapter '{name}' has already been loaded."}
        if not (Path(folder) / "adapter_config.json").exists():
            return 404, {"error": f"No adapter found for {folder}"}
        self._models[name] = PeftModel.from_pretrained(deepcopy(self._models["base"]), folder).eval()
        return 200, {}

    @torch.no_grad()
    def _choice(self, body: dict[str, Any], index: int) -> dict[str, Any]:
        model = self._models[body["model"]]
        generator = torch.Generator().manual_seed(body["seed"] + index)
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in body["stop_token_ids"]):
            logits = model(input_ids=torch.tensor([body["prompt"] + tokens])).logits[0, -1]
            every = torch.log_softmax(logits / (body["temperature"] or 1.0), dim=-1)
            drawn = torch.multinomial(every.exp(), 1, generator=generator)
            tokens.append(int(drawn if body["temperature"] else every.argmax()))
            logprobs.append(float(every[tokens[-1]]))
        return {
            "index": index,
            "token_ids": tokens,
            "prompt_token_ids": body["prompt"],
            "finish_reason": "stop" if tokens[-1] in body["stop_token_ids"] else "length",
            "logprobs": {"token_logprobs": logprobs},
        }


class _Handler(BaseHTTPRequestHandler):
    server_of: SmallServer

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict[str, Any]) -> None:
        small = self.server_of
        with small.turn:
            failure = next(small.failures, None)
        if failure == 0:
            self.connection.close()
            return
        if failure is not None:
            status, reply = failure, {"error": "not now"}
        elif small.key and self.headers["Authorization"] != f"Bearer {small.key}":
            status, reply = 401, {"error": "Unauthorized"}
        else:
            status, reply = small.reply(self.path, body)
            reply = small.change(self.path, reply) if small.change else reply
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Says nothing."""
