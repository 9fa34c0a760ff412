"""The counted length of a prompt is that of its encoding, for every family's own processor."""

import io
import json
from functools import partial

import pytest
import transformers as t
from PIL import Image

from lingshu_rl.data.load import DataError, load
from lingshu_rl.data.rows import row_to_prompt
from lingshu_rl.model import lengths as lengths_module
from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.model.lengths import Lengths, Limit, PictureTokens
from lingshu_rl.model.loading import model_path

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ IMAGE if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
BLANK_LINES = tuple(
    "\n" * n for n in range(1, 5)
)  # tokens of Gemma's vocabularies that its processors' texts merge with
GEMMA3 = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
GEMMA4 = {
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>", "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}  # fmt: skip
INTERNVL = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
}  # fmt: skip
IDEFICS = (
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)  # fmt: skip
GLM = tuple(
    f"<|{part}|>" for part in ("image", "video", "begin_of_image", "end_of_image", "begin_of_video", "end_of_video")
)


def qwen(cls, tokenizer, **kwargs):
    sizes = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
    return cls(t.Qwen2VLImageProcessor(**sizes), tokenizer, t.Qwen2VLVideoProcessor(**sizes), **kwargs)


def qwen3(tokenizer, **kwargs):
    images = t.Qwen2VLImageProcessor(size={"shortest_edge": 65536, "longest_edge": 16777216}, patch_size=16)
    return t.Qwen3VLProcessor(images, tokenizer, t.Qwen3VLVideoProcessor(), **kwargs)


def llava(tokenizer, **kwargs):
    images = t.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    rest = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return t.LlavaProcessor(images, tokenizer, **rest, **kwargs)


def llava_next(tokenizer, **kwargs):
    images = t.LlavaNextImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    rest = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return t.LlavaNextProcessor(images, tokenizer, **rest, **kwargs)


def onevision(tokenizer, **kwargs):
    return t.LlavaOnevisionProcessor(
        t.LlavaOnevisionImageProcessor(), tokenizer, t.LlavaOnevisionVideoProcessor(), num_image_tokens=729,
        vision_feature_select_strategy="full", **kwargs,
    )  # fmt: skip


def internvl(tokenizer, **kwargs):
    images = t.GotOcr2ImageProcessor(size={"height": 448, "width": 448})
    return t.InternVLProcessor(images, tokenizer, t.InternVLVideoProcessor(), **kwargs)


def gemma3(tokenizer, crops=False, **kwargs):
    pan = {
        "pan_and_scan_min_crop_size": 256,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    images = t.Gemma3ImageProcessor(size={"height": 896, "width": 896}, do_pan_and_scan=crops, **pan)
    return t.Gemma3Processor(images, tokenizer, **kwargs)


def gemma4(tokenizer, **kwargs):
    sound, images, films = t.Gemma4AudioFeatureExtractor(), t.Gemma4ImageProcessor(), t.Gemma4VideoProcessor()
    return t.Gemma4Processor(sound, images, tokenizer, films, **kwargs)


def paligemma(tokenizer, **kwargs):
    images = t.SiglipImageProcessor(size={"height": 224, "width": 224})
    images.image_seq_length = 256
    return t.PaliGemmaProcessor(images, tokenizer, **kwargs)


def smolvlm(tokenizer, **kwargs):
    pytest.importorskip("num2words")  # spells the times of frames in its prompts
    images = t.SmolVLMImageProcessor(size={"longest_edge": 1536}, max_image_size={"longest_edge": 512})
    films = t.SmolVLMVideoProcessor(size={"longest_edge": 512}, max_image_size={"longest_edge": 512})
    return t.SmolVLMProcessor(images, tokenizer, films, image_seq_len=64, **kwargs)


def idefics3(tokenizer, **kwargs):
    images = t.Idefics3ImageProcessor(size={"longest_edge": 1092}, max_image_size={"longest_edge": 364})
    return t.Idefics3Processor(images, tokenizer, image_seq_len=169, **kwargs)


def glm4v(tokenizer, **kwargs):
    return t.Glm4vProcessor(t.Glm4vImageProcessor(), tokenizer, t.Glm4vVideoProcessor(), **kwargs)


# Family -> its processor, what stands for an image in its template, named special tokens, other special tokens, plain ones.
FAMILIES = {
    "qwen2_vl": (partial(qwen, t.Qwen2VLProcessor), QWEN, {}, (), ()),
    "qwen2_5_vl": (partial(qwen, t.Qwen2_5_VLProcessor), QWEN, {}, (), ()),
    "qwen3_vl": (qwen3, QWEN, {}, (), ()),
    "llava": (llava, "<image>\n", {}, ("<image>",), ()),
    "llava_next": (llava_next, "<image>\n", {}, ("<image>",), ()),
    "llava_onevision": (onevision, "<image>\n", {}, ("<image>", "<video>"), ()),
    "internvl": (internvl, "<IMG_CONTEXT>\n", INTERNVL, (), ()),
    "gemma3": (gemma3, "<start_of_image>", GEMMA3, (), BLANK_LINES),
    "gemma3_crops": (partial(gemma3, crops=True), "<start_of_image>", GEMMA3, (), BLANK_LINES),
    "gemma4": (gemma4, "<|image|>", GEMMA4, ("<|video|>",), BLANK_LINES),
    "paligemma": (paligemma, "<image>", {"bos_token": "<bos>"}, ("<image>",), BLANK_LINES),
    "smolvlm": (smolvlm, "<image>", {}, IDEFICS, ()),
    "idefics3": (idefics3, "<image>", {}, IDEFICS, ()),
    "glm4v": (glm4v, "<|begin_of_image|><|image|><|end_of_image|>", {}, GLM, ()),
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory):
    """A family's PromptEncoder: its own processor class around the demo's tokenizer with the family's special tokens."""
    made = {}

    def make(name):
        if name == "demo":
            return PromptEncoder("demo")
        if name not in made:
            build, image, names, special, plain = FAMILIES[name]
            folder = tmp_path_factory.mktemp(name)
            tokenizer = t.AutoTokenizer.from_pretrained(model_path("demo"), **names)
            tokenizer.add_special_tokens(
                {"additional_special_tokens": list(special)}, replace_extra_special_tokens=False
            )
            tokenizer.add_tokens(list(plain))
            template = CHATML.replace("IMAGE", repr(image))
            tokenizer.chat_template = template
            build(tokenizer, chat_template=template).save_pretrained(folder)
            (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 1000}))
            made[name] = PromptEncoder(str(folder))
        return made[name]

    return make


def picture(width, height):
    data = io.BytesIO()
    Image.new("L", (width, height), 90).save(data, "PNG")
    return data.getvalue()


SIZES = [(20, 20), (640, 480), (480, 640), (700, 100), (100, 700), (300, 301), (1030, 1018)]


def prompts_of(sizes=SIZES):
    """One a size; then several images, images behind texts and in turns, blank lines beside an image, and no image."""
    films = [picture(*size) for size in sizes]
    image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    turns = [
        {"role": "user", "content": [text("First:\n"), image, text("\n\nand")]},
        {"role": "assistant", "content": "axial"},
        {"role": "user", "content": [image, image, text(" Which? Привет 中文")]},
    ]
    rows = [{"question": "Which side\nis it?", "images": [film]} for film in films]
    rows += [{"question": "?", "images": films[:4]}, {"question": "No image " * 30, "images": []}]
    rows += [{"messages": turns, "images": films[:3]}, {"messages": turns, "images": films[2:5]}]
    return [
        row_to_prompt({"id": str(n), "answer": "a vein", "kind": "open", **row}, instruction="short")
        for n, row in enumerate(rows)
    ]


@pytest.mark.parametrize("family", ["demo", *FAMILIES])
def test_the_counted_length_is_that_of_the_encoding(encoder_of, family):
    encoder, prompts = encoder_of(family), prompts_of()
    found = Lengths(PictureTokens(encoder)).count(prompts)
    assert [length.total for length in found] == [len(encoder.encode(prompt)[0]) for prompt in prompts]
    assert all(length.images > 0 for length, prompt in zip(found, prompts, strict=True) if prompt.images)


def counting(encoder, monkeypatch, arithmetic=True, offsets=True):
    """The encoder's processor counts its calls; it may have no arithmetic, or not know the word for offsets."""
    real, calls = encoder.processor, []

    class Other:
        def __call__(self, **given):
            if not offsets and "return_text_replacement_offsets" in given:
                raise TypeError("unexpected keyword")
            calls.append(given["images"])
            return real(**given)

        def __getattr__(self, name):
            if name == "_get_num_multimodal_tokens" and not arithmetic:
                raise AttributeError(name)
            return getattr(real, name)

    monkeypatch.setattr(encoder, "processor", Other())
    return calls


MANY = [(40 + 7 * n, 200 + 11 * (n % 13)) for n in range(60)]


def test_arithmetic_spares_the_processor_all_but_the_extreme_sizes(encoder_of, monkeypatch):
    """So that a set of as many sizes as images starts soon."""
    encoder = encoder_of("qwen2_5_vl")
    prompts = prompts_of(MANY)
    calls = counting(encoder, monkeypatch)
    Lengths(PictureTokens(encoder)).count(prompts)
    assert len(calls) <= 4


@pytest.mark.parametrize(("arithmetic", "offsets"), [(False, True), (False, False), (True, False)])
def test_without_arithmetic_one_picture_of_each_size_is_encoded(encoder_of, monkeypatch, arithmetic, offsets):
    encoder = encoder_of("qwen2_5_vl")
    prompts = prompts_of()
    wanted = [len(encoder.encode(prompt)[0]) for prompt in prompts]
    calls = counting(encoder, monkeypatch, arithmetic, offsets)
    lengths = Lengths(PictureTokens(encoder))
    assert [length.total for length in lengths.count(prompts)] == wanted
    if not arithmetic:
        assert len(calls) == len({picture.size for prompt in prompts for picture in prompt.images})
    before = len(calls)
    assert [length.total for length in lengths.count(prompts)] == wanted and len(calls) == before


def test_a_picture_that_the_processor_cannot_read_is_the_rows_fault(encoder_of, monkeypatch):
    encoder = encoder_of("demo")

    def refuse(**given):
        raise ValueError("absolute aspect ratio must be smaller than 20")

    monkeypatch.setattr(encoder, "processor", refuse)
    lengths = Lengths(PictureTokens(encoder))
    prompts = prompts_of()[3:4]
    lengths.look(prompts)
    assert "cannot read an image of 700 x 100 pixels" in lengths.of(prompts[0]) and "smaller than 20" in lengths.of(
        prompts[0]
    )


def text_rows(*words):
    return [
        {"id": f"r{n}", "question": "so " * count, "answer": "a vein", "kind": "open", "images": []}
        for n, count in enumerate(words)
    ]


def totals(encoder, rows):
    return {p.id: len(encoder.encode(p)[0]) for p in load(rows, instruction="short").prompts}


def test_rows_over_the_limit_are_refused_by_row_with_the_numbers_and_what_to_do(encoder_of):
    encoder, rows = encoder_of("demo"), text_rows(5, 90, 20, 80)
    rows[3]["images"] = [picture(112, 112)]
    real = totals(encoder, rows)
    lengths = Lengths(PictureTokens(encoder), Limit(real["r2"], "max_model_len=99 leaves beside rollout.max_tokens=9"))
    with pytest.raises(DataError) as caught:
        load(rows, instruction="short", fault=lengths.fault, lengths=lengths)
    assert [bad.place for bad in caught.value.refused] == ["row 2", "row 4"]
    told = str(caught.value)
    assert (
        f"row 2 (id r1): its prompt has {real['r1']} tokens (text {real['r1']}, images 0), over the {real['r2']} that"
        in told
    )
    assert f"has {real['r3']} tokens (text {real['r3'] - 16}, images 16)" in told
    assert "max_model_len=99 leaves beside rollout.max_tokens=9" in told and "data.too_long=drop" in told
    skipping = load(
        rows,
        instruction="short",
        fault=lengths.fault,
        lengths=Lengths(PictureTokens(encoder), lengths.limit),
        skip_bad_rows=True,
    )
    assert list(skipping.prompts.ids) == ["r0", "r2"] and len(skipping.refused) == 2


def test_rows_over_the_limit_are_dropped_counted_and_shown_when_told_so(encoder_of, caplog):
    encoder, rows = encoder_of("demo"), text_rows(5, 90, 20, 80)
    real = totals(encoder, rows)
    lengths = Lengths(PictureTokens(encoder), Limit(real["r2"], "it takes"))
    found = load(rows, instruction="short", fault=lengths.fault, lengths=lengths, drop_long=True)
    assert list(found.prompts.ids) == ["r0", "r2"] and [one.id for one in found.too_long] == ["r1", "r3"]
    assert not found.refused and "2 of 4 rows are left out as too long" in caplog.text
    longest = lengths.longest()
    assert (longest.id, longest.total) == ("r2", real["r2"])
    with pytest.raises(DataError, match="No usable row is left"):
        none = Lengths(PictureTokens(encoder), Limit(1, "it takes"))
        load(rows, instruction="short", fault=none.fault, lengths=none, drop_long=True)


def test_of_a_large_set_the_texts_of_most_bytes_are_read_and_the_others_bounded(encoder_of, monkeypatch):
    encoder, rows = encoder_of("demo"), text_rows(*range(1, 40), 300, *range(1, 40))
    real = totals(encoder, rows)
    read = []
    count = encoder.text_lengths
    monkeypatch.setattr(lengths_module, "KEPT", 8)
    monkeypatch.setattr(encoder, "text_lengths", lambda texts: read.extend(texts) or count(texts))
    lengths = Lengths(PictureTokens(encoder), Limit(5000, "it takes"))
    load(rows, instruction="short", fault=lengths.fault, lengths=lengths)
    longest = lengths.longest()
    assert (longest.id, longest.total) == ("r39", real["r39"]) and len(read) == 8
    assert max(real[f"r{n}"] for n in range(35)) <= lengths.bound < longest.total
