"""Code that scores with an exported classifier where moslim is not installed, for its model card."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from moslim.data.prompts import around, end_id
from moslim.reward.classifier import PreferenceClassifierConfig
from moslim.reward.pooling import Pooling
from moslim.reward.sharing import Form

_BACKBONES: dict[Form, str] = {
    "merged": 'backbone = AutoModel.from_pretrained(f"{folder}/backbone").eval()',
    "adapter": """with open(f"{folder}/adapter/base.json", encoding="utf-8") as file:
    base = AutoModel.from_pretrained(json.load(file)["name"], dtype=torch.float32)
backbone = PeftModel.from_pretrained(base, f"{folder}/adapter").eval()""",
}
_POOLED: dict[Pooling, str] = {
    "last": "hidden[-1]",
    "mean": "hidden.mean(0)",
    "first": "hidden[0]",
    "max": "hidden.amax(0)",
}
_SLICE = "raw, outputs = outputs[:WIDTH], outputs[WIDTH:]"
_OWN = """def own_head(name, features):
    \"\"\"Raw outputs of a head that is a network of its own.\"\"\"
    if f"{name}.weight" in heads:
        return F.linear(features, heads[f"{name}.weight"], heads[f"{name}.bias"])
    hidden = F.gelu(F.linear(features, heads[f"{name}.0.weight"], heads[f"{name}.0.bias"]))
    return F.linear(hidden, heads[f"{name}.3.weight"], heads[f"{name}.3.bias"])


"""
_LINKS = {
    "softmax": ("len(levels)", "raw"),
    "corn": ("len(levels) - 1", "(F.pad(F.logsigmoid(raw).cumsum(0), (1, 0)) + F.pad(F.logsigmoid(-raw), (0, 1)))"),
    "regression": (
        "1",
        "(1 - ((raw + (len(levels) - 1) / 2).clamp(0, len(levels) - 1) - torch.arange(len(levels))).abs())"
        ".clamp(min=1e-7).log()",
    ),
}


def plain_use(config: PreferenceClassifierConfig, tokenizer: PreTrainedTokenizerBase, form: Form) -> str:
    """Returns Python code that defines ``score(question, answer)``, with torch, safetensors and transformers alone.

    It gives what :class:`~moslim.Scorer` gives, but for cutting long pairs and taking special tokens out
    of texts.

    Args:
        config: The classifier's configuration.
        tokenizer: Its tokenizer.
        form: The form in which it is exported; the adapter form needs peft as well.
    """
    prompt = 'question + "\\n"'
    if tokenizer.chat_template is not None:
        chat = '[{"role": "user", "content": question}]'
        prompt = f"tokenizer.apply_chat_template(\n        {chat}, tokenize=False, add_generation_prompt=True\n    )"
    before, after = ([], []) if tokenizer.chat_template is not None else around(tokenizer)
    beginning, parting = f"{before} + " if before else "", f" + {after}" if after else ""
    width, logits = _LINKS[config.link]
    linear = config.head_hidden is None
    outputs = '    outputs = F.linear(features, heads["head.weight"], heads["head.bias"])\n' if linear else ""
    hidden = "backbone(input_ids=torch.tensor([ids])).last_hidden_state"
    if config.layer is not None:
        hidden = f"backbone(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[{config.layer}]"
    pooled = [_POOLED[kind] for kind in config.pooling]
    features = pooled[0] if len(pooled) == 1 else f"torch.cat([{', '.join(pooled)}])"
    raw = _SLICE.replace("WIDTH", width) if linear else 'raw = own_head(f"head.{name}", features)'
    if added := [head["dimension"] for head in config.added_heads]:
        own = 'raw = own_head(f"added.{name}", features)'
        raw = f"if name in {added}:\n            {own}\n        else:\n            {raw}"
    own_head = _OWN if "own_head" in raw else ""
    temperature = "" if config.temperatures is None else ' / config["temperatures"][number]'
    peft = "from peft import PeftModel\n" if form == "adapter" else ""
    return f"""import json

import torch
import torch.nn.functional as F
{peft}from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = "."  # where this file lies; from the Hub: huggingface_hub.snapshot_download("owner/name")
with open(f"{{folder}}/config.json", encoding="utf-8") as file:
    config = json.load(file)
heads = load_file(f"{{folder}}/heads.safetensors")
tokenizer = AutoTokenizer.from_pretrained(folder)
{_BACKBONES[form]}


{own_head}@torch.no_grad()
def score(question, answer):
    \"\"\"Probability of every level, by dimension.\"\"\"
    prompt = {prompt}
    ids = {beginning}tokenizer(prompt, add_special_tokens=False)["input_ids"]{parting}
    ids += tokenizer(answer, add_special_tokens=False)["input_ids"] + [{end_id(tokenizer)}]  # the answer's end
    hidden = {hidden}[0].float()
    features = {features}
{outputs}    result = {{}}
    for number, (name, levels) in enumerate(config["dimensions"]):
        {raw}
        logits = {logits}{temperature}
        result[name] = dict(zip(levels, logits.softmax(0).tolist()))
    return result


print(score("How do I make tea?", "Boil some water, pour it over the leaves and wait."))"""
