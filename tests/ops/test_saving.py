"""A saved policy samples as it was trained, whatever generation config its start brought along."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from moslim.generation.torch_engine import TorchEngine
from moslim.ops.loading import generation_config
from moslim.ops.models import Architecture, WorkbenchTokenizer
from moslim.policy.supervised_trainer import SupervisedTrainer
from tests.helpers.policy_models import ARCHITECTURES, ENDS, build_model
from tests.helpers.policy_runs import LORA, data, make, trainer

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")

LENGTH, STOPS = 24, [70, 71]
BROUGHT = {
    "eos_token_id": ENDS,  # others than the tokenizer's
    "pad_token_id": 9,
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 2,
    "top_p": 0.3,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 7,
    "bad_words_ids": [[40]],
    "num_beams": 3,
    "max_length": 5,
    "suppress_tokens": [41],
}


@pytest.fixture
def start(tokenizer, tmp_path):
    folder = tmp_path / "start"
    model = build_model("grouped", tokenizer)
    model.config.eos_token_id, model.config.pad_token_id = 3, 9
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(BROUGHT))
    return str(folder)


def saved(folder):
    return json.loads((Path(folder) / "generation_config.json").read_text())


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_an_exported_policy_stops_where_training_stopped(lora, start, preferences, tokenizer, classifier, tmp_path):
    engine = TorchEngine(LENGTH, temperature=0.8, top_k=30, top_p=0.95, stop_ids=STOPS)
    module = make(preferences, start, classifier, engine=engine, lora=lora)
    trainer(tmp_path, max_steps=1).fit(module, data(preferences))
    before = module.policy.generation_config.to_dict(), module.policy.config.to_dict()
    module.export(str(tmp_path / "model"))
    assert (module.policy.generation_config.to_dict(), module.policy.config.to_dict()) == before

    ends = sorted({*ENDS, *STOPS, tokenizer.eos_token_id})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = saved(tmp_path / "model")
    found.pop("transformers_version")
    assert found.pop("bos_token_id", None) == model.config.bos_token_id
    assert found == {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 30,
        "top_p": 0.95,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.pad_token_id,
        "max_new_tokens": LENGTH,
    }
    assert model.config.eos_token_id == ends and model.config.pad_token_id == tokenizer.pad_token_id

    torch.manual_seed(0)
    prompt = torch.randint(6, len(tokenizer), (1, 5), generator=torch.Generator().manual_seed(0))
    answers = model.generate(prompt.repeat(40, 1))[:, 5:]
    is_end = torch.isin(answers, torch.tensor(ends))
    assert answers.shape[1] <= LENGTH and is_end.any(dim=1).sum() > 30 and is_end[:, :7].any()
    assert {40, 41} & set(answers.flatten().tolist())  # neither forbidden ...
    after = (is_end.cumsum(dim=1) - is_end.int()) > 0
    assert (answers[after] == tokenizer.pad_token_id).all()  # ... nor gone on behind an end


def test_a_policy_of_greedy_answers_gives_them_again(start, preferences, classifier, tmp_path):
    engine = TorchEngine(LENGTH, temperature=0.0)
    module, source = make(preferences, start, classifier, engine=engine), data(preferences)
    trainer(tmp_path, max_steps=1).fit(module, source)
    module.export(str(tmp_path / "model"))
    model, tokenizer = (kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    renderer = source.renderer(tokenizer)
    ids = torch.tensor([renderer.encoder.prompt([{"role": "user", "content": "How do I clean a kettle?"}])])
    answer = tokenizer.decode(model.generate(ids)[0, ids.shape[1] :], skip_special_tokens=True)
    assert [answer] == module.answer("How do I clean a kettle?", {}) and len(answer.split()) > 2


def test_a_supervised_model_is_saved_so_too(start, tokenizer, tmp_path):
    SupervisedTrainer(model=start, engine=TorchEngine(LENGTH, stop_ids=STOPS)).export(str(tmp_path / "model"))
    found = saved(tmp_path / "model")
    ends = sorted({*ENDS, *STOPS, tokenizer.eos_token_id})
    assert found["eos_token_id"] == ends == json.loads((tmp_path / "model/config.json").read_text())["eos_token_id"]
    assert found["temperature"] == 1 and found["top_k"] == 0 and "repetition_penalty" not in found
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.generate(torch.tensor([[7, 8]])).shape[1] <= LENGTH + 2


def test_random_weights_have_the_tokenizer_s_end(tokenizer, tmp_path):
    kind, options = ARCHITECTURES["llama"]
    SupervisedTrainer(architecture=Architecture(kind, WorkbenchTokenizer(), options)).export(str(tmp_path / "model"))
    assert saved(tmp_path / "model")["eos_token_id"] == tokenizer.eos_token_id


def test_the_card_names_texts_that_end_an_answer(preferences, lm, classifier, tmp_path):
    engine = TorchEngine(LENGTH, stop_strings=["kettle ."])
    module, source = make(preferences, lm, classifier, engine=engine), data(preferences)
    trainer(tmp_path, max_steps=1).fit(module, source)
    module.export(str(tmp_path / "model"))
    card = (tmp_path / "model/README.md").read_text()
    assert """model.generate(input_ids=inputs["input_ids"], stop_strings=['kettle .'], tokenizer=tokenizer)""" in card


def test_all_tokens_are_drawn_where_none_are_cut():
    found = generation_config(TorchEngine(9), [2], 0, None)
    assert (found.do_sample, found.temperature, found.top_k, found.top_p) == (True, 1.0, 0, 1.0)
    assert (found.eos_token_id, found.pad_token_id, found.max_new_tokens) == (2, 0, 9)
    assert generation_config(TorchEngine(9, temperature=0), [2], 0, None).do_sample is False
