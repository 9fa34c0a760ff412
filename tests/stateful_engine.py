"""A stand-in for vLLM's weight routes that keeps the state they keep, and fails where it is told to.

The rules are those of vLLM 0.32's worker: one update at a time; a layer is made of the first tensors that come, as many as
it has, whatever they are; an update that raised is closed while its layers still wait for the rest.
"""

import json

import httpx

FAULTS = {
    "refused before it arrives": (False, httpx.ConnectError("refused")),
    "cut before it is carried out": (False, httpx.ReadError("reset")),
    "carried out, answer lost": (True, httpx.ReadError("reset")),
    "carried out, no answer in time": (True, httpx.ReadTimeout("")),
    "error before": (False, httpx.Response(500, text="out of order")),
    "error after": (True, httpx.Response(502, text="bad gateway")),
    "busy": (False, httpx.Response(503, text="busy")),
}


PARTS = 3  # tensors of a layer, as of query, key and value


class Engine:
    """holds: by layer, the tensors that it was made of. waiting: by layer, those that came; None between updates."""

    def __init__(self, folder):
        self.folder = folder
        self.open, self.waiting = False, None
        self.holds, self.version, self.adapters, self.calls = {}, None, {}, []
        self.fails = {}  # route -> name of a fault, once

    def handler(self, request):
        route = request.url.path
        self.calls.append(route)
        carried_out, outcome = FAULTS[self.fails.pop(route)] if route in self.fails else (True, None)
        answer = self.carry_out(route, request) if carried_out else None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome or answer

    def carry_out(self, route, request):
        try:
            getattr(self, route.rpartition("/")[2], dict)(**json.loads(request.content or b"{}"))
        except RuntimeError as error:
            return httpx.Response(500, text=str(error))
        return httpx.Response(200, json={})

    def start_weight_update(self):
        if self.open:
            raise RuntimeError("a weight update is already active")
        self.open, self.waiting = True, {} if self.waiting is None else self.waiting

    def update_weights(self, update_info):
        from safetensors.torch import load_file

        if not self.open:
            raise RuntimeError("start_weight_update must be called before")
        try:
            tensors = load_file(self.folder / update_info["file"])
        except Exception as error:
            self.open = False
            raise RuntimeError(f"{error}") from None
        for name, tensor in tensors.items():
            came = self.waiting.setdefault(name.split(".")[0], [])
            if len(came) < PARTS:  # a layer that is full takes no more
                came.append(tensor.item())

    def finish_weight_update(self, weight_version=None):
        if not self.open:
            raise RuntimeError("finish_weight_update without a start")
        for name, came in self.waiting.items():
            self.holds[name] = came
        self.open, self.waiting, self.version = False, None, weight_version

    def load_lora_adapter(self, lora_name, lora_path):
        if lora_name in self.adapters:
            raise RuntimeError(f"{lora_name} has been loaded already")
        self.adapters[lora_name] = (self.folder / lora_path / "adapter").read_text()

    def unload_lora_adapter(self, lora_name):
        if self.adapters.pop(lora_name, None) is None:
            raise RuntimeError(f"{lora_name} is not loaded")

    def reset_prefix_cache(self):
        pass
