"""Makes the files of this folder in an environment with LeRobot; no test runs it.

python make.py write      with LeRobot 0.4.4 and transformers 4: `recordings/`, `tokenizer.model` and `tokenizer.json`
python make.py expect     with LeRobot 0.4.4 and again with 0.6.1: `lerobot-0.4.npz` and `lerobot.npz`
"""

import io
import shutil
import sys
import types
from importlib.metadata import version
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors
from lerobot.processor import tokenizer_processor
from transformers import GemmaTokenizerFast, PreTrainedTokenizerFast

HERE = Path(__file__).parent
RECORDINGS, TOKENIZER = HERE / "recordings", HERE / "tokenizer"
SIZE, PROMPT_LENGTH, STATE = 28, 160, 5
EPISODES = ((5, " pick_up the red cube\n"), (4, "open the drawer"))
CAMERAS = {"observation.images.top": ("video", 48, 64), "observation.images.wrist": ("image", 30, 24)}


def write() -> None:
    shutil.rmtree(RECORDINGS, ignore_errors=True)
    features = {
        name: {"dtype": kind, "shape": (height, width, 3), "names": ["height", "width", "channels"]}
        for name, (kind, height, width) in CAMERAS.items()
    }
    features["observation.state"] = {"dtype": "float32", "shape": (STATE,), "names": None}
    features["action"] = {"dtype": "float32", "shape": (4,), "names": None}
    dataset = LeRobotDataset.create("test/recordings", fps=10, features=features, root=RECORDINGS)
    generator, count = np.random.default_rng(3), 0
    for length, task in EPISODES:
        for _ in range(length):
            state = generator.standard_normal(STATE) * [1, 2, 0.1, 5, 0]  # the last never moves
            frame = {"observation.state": state, "action": generator.standard_normal(4)}
            frame = {name: values.astype(np.float32) for name, values in frame.items()}
            for name, (_, height, width) in CAMERAS.items():
                frame[name] = picture(height, width, count)
            dataset.add_frame({**frame, "task": task})
            count += 1
        dataset.save_episode()
    dataset.finalize()
    texts = [f"Task: {task.strip()}, State: -1 0 12 127 128 255; Action: " for _, task in EPISODES] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n"],
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"},
    )
    TOKENIZER.mkdir(exist_ok=True)
    file = TOKENIZER / "tokenizer.model"
    file.write_bytes(model.getvalue())
    GemmaTokenizerFast(str(file)).backend_tokenizer.save(str(TOKENIZER / "tokenizer.json"))


def picture(height: int, width: int, number: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [
        127 + 120 * np.sin(x / 9 + number),
        127 + 120 * np.cos(y / 7 - number),
        (x + y + 40 * number) % 256,
    ]
    return np.stack(waves, -1).astype(np.uint8)


def expect() -> None:
    dataset = LeRobotDataset("test/recordings", root=RECORDINGS, video_backend="pyav")
    config = PI05Config(
        device="cpu",
        tokenizer_max_length=PROMPT_LENGTH,
        image_resolution=(SIZE, SIZE),
        empty_cameras=1,
        input_features={
            **{name: PolicyFeature(FeatureType.VISUAL, (3, *sizes)) for name, (_, *sizes) in CAMERAS.items()},
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (4,))},
    )
    config.validate_features()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER / "tokenizer.json"), pad_token="<pad>")
    tokenizer_processor.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda name: tokenizer)
    preprocess, _ = make_pi05_pre_post_processors(config, dataset.meta.stats)
    policy = types.SimpleNamespace(config=config, parameters=lambda: iter([torch.zeros(1)]))
    found = []
    for number in range(len(dataset)):
        batch = preprocess(dataset[number])
        images, masks = PI05Policy._preprocess_images(policy, batch)
        found.append(
            {
                "images": torch.stack(images, 1),
                "image_masks": torch.stack(masks, 1),
                "tokens": batch["observation.language.tokens"],
                "token_masks": batch["observation.language.attention_mask"],
            }
        )
    name = "lerobot-0.4" if version("lerobot").startswith("0.4.") else "lerobot"
    arrays = {key: np.stack([each[key].numpy() for each in found]) for key in found[0]}
    np.savez_compressed(HERE / f"{name}.npz", **arrays)


if __name__ == "__main__":
    {"write": write, "expect": expect}[sys.argv[1]]()
