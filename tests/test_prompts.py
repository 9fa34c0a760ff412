"""What is known of a run's prompts before anything starts, and what the engine is started with for it."""

import asyncio
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from PIL import Image

from lingshu_rl.cli import train_main
from lingshu_rl.data.load import DataError, load
from lingshu_rl.failures import ConfigError, RunStopped
from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.model.lengths import Length, Lengths, PictureTokens
from lingshu_rl.planning.given import load_config
from lingshu_rl.processes.placement import DeviceSet
from lingshu_rl.processes.workers import free_port
from lingshu_rl.prompts import awaited_context, count_prompts, engine_context, with_context
from lingshu_rl.rollout.client import SilentServer, served_context
from lingshu_rl.rollout.sampler import RolloutError
from lingshu_rl.rollout.server import vllm_command
from lingshu_rl.run import Run
from lingshu_rl.storage.runfolder import RunFolder


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder("demo")


def film():
    data = io.BytesIO()
    Image.new("L", (112, 112), 90).save(data, "PNG")
    return data.getvalue()


def sources(folder, train=(3, 40, 9), test=(5, 20), images=()):
    """Files of rows with questions of so many words, those numbered in `images` with an image; as settings."""
    (folder / "film.png").write_bytes(film())
    for name, words in (("train", train), ("test", test)):
        rows = [
            {
                "id": f"{name}{n}",
                "question": "so " * count,
                "answer": "a vein",
                "kind": "open",
                "images": ["film.png"] * (n in images),
            }
            for n, count in enumerate(words)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"data.train={folder}/train.jsonl", f"data.test={folder}/test.jsonl", "rollout.max_tokens=30"]


def counted(encoder, settings, **more):
    config = load_config(None, settings)
    return config, count_prompts(config, encoder, engine_context(config, encoder, "t"), **more)


def length(encoder, found, name):
    return len(encoder.encode(found.sets[name.rstrip("0123456789")].prompts.by_id(name))[0])


def test_the_engine_starts_with_room_for_the_longest_prompt_and_a_completion(encoder, tmp_path):
    config, found = counted(encoder, [*sources(tmp_path), "eval.controls=[]"])
    longest = length(encoder, found, "train1")
    assert found.longest() == ("train", found.lengths["train"].longest()) and found.longest()[1].total == longest
    assert found.needed(config) == longest + 30
    command = vllm_command(with_context(config, found.needed(config)), "m", DeviceSet(), port=1)
    assert command[command.index("--max-model-len") + 1] == str(longest + 30)
    for kept in (["rollout.vllm.max_model_len=99"], ["rollout.urls=[http://a]"]):
        given = load_config(None, kept)
        assert with_context(given, 50) == given


def test_images_that_are_swapped_into_the_longest_question_have_room_too(encoder, tmp_path):
    settings = sources(tmp_path, train=(3,), test=(2, 50), images=(0,))
    config, found = counted(encoder, [*settings, "eval.controls=[shuffled]"])
    both = length(encoder, found, "test1") + 16
    assert found.longest()[1].total < both and found.needed(config) == both + 30
    config, found = counted(encoder, [*settings, "eval.controls=[blank]"])
    assert found.needed(config) == length(encoder, found, "test1") + 30


def test_what_is_needed_stays_within_what_the_model_can(encoder, tmp_path):
    settings = [*sources(tmp_path, train=(3, 1900)), "rollout.max_tokens=150"]
    with pytest.raises(
        DataError, match=r"line 2 \(id train1\).*over the 1,898 that the model's context of 2,048 tokens leaves"
    ):
        counted(encoder, settings)
    with pytest.raises(
        ConfigError, match=r"rollout.max_tokens=2048 leaves nothing to the prompt of the model's context"
    ):
        counted(encoder, [*settings, "rollout.max_tokens=2048"])


def test_dropped_rows_are_listed_in_the_run_folder(encoder, tmp_path):
    settings = [*sources(tmp_path), "rollout.vllm.max_model_len=90"]
    with pytest.raises(
        DataError, match=r"over the 60 that rollout.vllm.max_model_len=90 leaves beside rollout.max_tokens=30"
    ):
        counted(encoder, settings)
    folder = RunFolder(tmp_path / "run")
    _, found = counted(encoder, [*settings, "data.too_long=drop"], folder=folder)
    assert list(found.sets["train"].prompts.ids) == ["train0", "train2"] and len(found.sets["test"].prompts) == 2
    (listed,) = map(json.loads, (folder.path / "eval" / "refused_train.jsonl").read_text().splitlines())
    assert listed["id"] == "train1" and listed["place"] == "line 2" and "over the 60" in listed["reason"]


class Models(BaseHTTPRequestHandler):
    longest, token = 80, "Bearer t"

    def do_GET(self):
        allowed = self.headers["authorization"] == self.token and self.path == "/v1/models"
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(
            json.dumps({"data": [{"max_model_len": self.longest}]} if allowed else {"error": "who"}).encode()
        )

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """Starts a server that says its max_model_len; returns its URL."""
    running = []

    def start(longest, port=0):
        server = HTTPServer(("127.0.0.1", port), type("Of", (Models,), {"longest": longest}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_given_servers_say_themselves_what_they_take(encoder, tmp_path, serve):
    settings = [*sources(tmp_path), f"rollout.urls=[{serve(500)}/,{serve(80)}]"]
    with pytest.raises(DataError, match=r"over the 50 that max_model_len=80 of the servers in rollout.urls leaves"):
        counted(encoder, settings)
    with pytest.raises(RolloutError, match=r"/v1/models answers 401.*LINGSHU_RL_TOKEN"):
        served_context([serve(80)], "another")


def test_a_server_that_is_still_starting_is_waited_for(encoder, serve):
    port = free_port("127.0.0.1")
    config = load_config(None, [f"rollout.urls=[http://127.0.0.1:{port}]"])
    with pytest.raises(SilentServer, match=rf"http://127.0.0.1:{port}/v1/models does not answer"):
        engine_context(config, encoder, "t")
    later = threading.Timer(0.3, serve, (70, port))
    later.start()
    assert asyncio.run(awaited_context(config, encoder, "t")).tokens == 70
    later.join()
    with pytest.raises(SilentServer):
        gone = load_config(
            None, [f"rollout.urls=[http://127.0.0.1:{free_port('127.0.0.1')}]", "rollout.start_timeout_s=0"]
        )
        asyncio.run(awaited_context(gone, encoder, "t"))


def dry(capsys, *settings):
    code = train_main(["--dry-run", *settings])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_dry_run_shows_pixels_the_longest_prompt_with_its_row_and_the_engines_context(encoder, tmp_path, capsys):
    settings = [*sources(tmp_path, images=(1,)), "data.max_pixels=500000"]
    _, found = counted(encoder, settings)
    longest = length(encoder, found, "train1")
    code, out, _ = dry(capsys, *settings)
    assert code == 0 and "# images: 3,136 to 500,000 pixels each" in out
    assert (
        f"# longest prompt: {longest} tokens (text {longest - 16}, images 16), line 2 (id train1) of data.train" in out
    )
    assert f"max_model_len={longest + 30}, with rollout.max_tokens=30" in out
    code, out, _ = dry(capsys, *settings, "rollout.vllm.max_model_len=500")
    assert code == 0 and "max_model_len=500, as given" in out
    code, out, _ = dry(capsys, *settings, "rollout.vllm.max_model_len=90", "data.too_long=drop")
    assert code == 0 and "data.train: 1 rows are left out as too long (data.too_long=drop), the first: line 2" in out


def test_a_dry_run_with_given_servers_asks_them_and_goes_on_without(tmp_path, capsys, serve, monkeypatch):
    monkeypatch.setenv("LINGSHU_RL_TOKEN", "t")
    settings = sources(tmp_path)
    code, out, _ = dry(capsys, *settings, f"rollout.urls=[{serve(300)}]")
    assert code == 0 and "# context: max_model_len=300 of the servers in rollout.urls" in out
    code, out, _ = dry(capsys, *settings, f"rollout.urls=[http://127.0.0.1:{free_port('127.0.0.1')}]")
    assert code == 0 and "no prompt is held against the servers' max_model_len" in out


WRONG = {
    "no model folder": (["model=/nothing/here"], "model '/nothing/here' cannot be read"),
    "no such file": (["data.train=/nothing.jsonl", "data.test=/nothing.jsonl"], "/nothing.jsonl: no such file"),
    "arguments": (["train.optimizer_args={beta: 1}"], "train.optimizer_args of adamw: .*'beta'"),
    "values": (["train.optimizer_args={betas: [3, 4]}"], "train.optimizer_args of adamw: .*beta"),
    "muon's arguments": (["train.optimizer=muon", "train.max_grad_norm=0", "train.optimizer_args={lr2: 1}"], "muon takes"),
    "rows": (["rollout.vllm.max_model_len=50"], "rows cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_dry_run_of_what_would_not_start_says_why_once_and_ends_with_1(case, capsys):
    settings, why = WRONG[case]
    code, _, err = dry(capsys, *settings)
    assert code == 1 and err.count("the run would not start") == 1
    assert re.search(why, err)


def test_the_engine_must_have_read_the_trainers_tokens(encoder):
    """By their number, which costs no image; where that is off, by the tokens themselves."""
    prompt = load("demo:validation", instruction="short").prompts[0]
    ids, _ = encoder.encode(prompt)
    run = SimpleNamespace(encoder=encoder, lengths=Lengths(PictureTokens(encoder)))
    assert encoder.read(Run.inputs(run, prompt, ids))[0] == ids
    with pytest.raises(
        RunStopped, match=f"the engine read {len(ids) + 1} tokens, the trainer's processor makes {len(ids)}"
    ):
        Run.inputs(run, prompt, (*ids, 5))
    run.lengths = SimpleNamespace(count=lambda prompts: [Length("", 7, 0)])
    assert Run.inputs(run, prompt, ids).images == (prompt.images[0].encoded(),)
