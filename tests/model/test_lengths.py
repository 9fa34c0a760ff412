"""The counted length of a prompt is that of its encoding, for every family's own processor."""

import io
import json
from functools import partial

import pytest
import transformers as t
from PIL import Image

from lingshu_rl.data.rows import row_to_prompt
from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.model.lengths import Lengths
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
    found = Lengths(encoder).count(prompts)
    assert [length.total for length in found] == [len(encoder.encode(prompt)[0]) for prompt in prompts]
    assert all(length.images > 0 for length, prompt in zip(found, prompts, strict=True) if prompt.images)
