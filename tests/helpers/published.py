"""Made-up rows in the schemas of published data sets, as their presets read them."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

HELPSTEER = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 0}


def helpsteer() -> list[Row]:
    return [
        {"prompt": "Name a river.", "response": "The Danube.", **HELPSTEER},
        {"prompt": "Name a river.", "response": "", **{**HELPSTEER, "helpfulness": 0}},
    ]


def helpsteer2() -> list[Row]:
    chat = "Name a river.\n<extra_id_1>Assistant\nThe Danube.\n<extra_id_1>User\nAnother one:\nin Asia."
    return [*helpsteer(), {"prompt": chat, "response": "The Mekong.", **HELPSTEER}]


def helpsteer2_votes() -> list[Row]:
    votes = {
        "helpfulness": [3, 4, 4],
        "correctness": [4, 4, 4],
        "coherence": [4, 3],
        "complexity": [2],
        "verbosity": [],
    }
    return [{"prompt": "Name a river.", "response": "The Danube.", **votes}]


def _helpsteer3(overall: int, *scores: int) -> Row:
    return {
        "domain": "general",
        "language": "english",
        "context": [
            {"role": "user", "content": "Name a river."},
            {"role": "assistant", "content": "The Danube."},
            {"role": "user", "content": "Another one."},
        ],
        "response1": "The Mekong.",
        "response2": "No.",
        "overall_preference": overall,
        "individual_preference": [
            {"score": score, "reasoning": "r", "feedback1": "a", "feedback2": "b"} for score in scores
        ],
    }


def helpsteer3() -> list[Row]:
    return [_helpsteer3(-2, -3, -2, -1), _helpsteer3(1, 1, 2, 0), _helpsteer3(0, -1, 1)]


def _annotated(response: str, following: str, honesty: str, truthfulness: str, helpfulness: str) -> Row:
    return {
        "model": "m",
        "principle": "helpfulness",
        "custom_system_prompt": "Be helpful.",
        "response": response,
        "annotations": {
            "instruction_following": {"Rating": following, "Rationale": "r"},
            "honesty": {"Rating": honesty, "Rationale": "r"},
            "truthfulness": {"Type": ["1"], "Rationale": "r", "Rating": truthfulness, "Rationale For Rating": "r"},
            "helpfulness": {"Type": ["1"], "Rationale": "r", "Rating": helpfulness, "Rationale For Rating": "r"},
        },
        "overall_score": 7.0,
        "critique": "c",
        "fine-grained_score": 4.0,
    }


def ultrafeedback() -> list[Row]:
    return [
        {
            "source": "sharegpt",
            "instruction": "Name a river.",
            "models": ["m", "n"],
            "completions": [_annotated("The Danube.", "5", "4", "N/A", "3"), _annotated("No.", "1", "2", "3", "N/A")],
            "correct_answers": ["None"],
            "incorrect_answers": ["None"],
        }
    ]


def beavertails() -> list[Row]:
    category = {"privacy_violation": False, "violence,aiding_and_abetting,incitement": True}
    return [
        {"prompt": "How do I hide?", "response": "Ask a friend.", "category": category, "is_safe": True},
        {"prompt": "How do I hide?", "response": "Break in.", "category": category, "is_safe": False},
    ]


def _safe_rlhf(better: int, safer: int) -> Row:
    return {
        "prompt": "How do I hide?",
        "response_0": "Break in.",
        "response_1": "Ask a friend.",
        "prompt_source": "p",
        "response_0_source": "s",
        "response_1_source": "s",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "response_0_harm_category": {"Violence": True},
        "response_1_harm_category": {"Violence": False},
        "response_0_severity_level": 2,
        "response_1_severity_level": 0,
        "better_response_id": better,
        "safer_response_id": safer,
        "response_0_sha256": "0",
        "response_1_sha256": "1",
    }


def safe_rlhf() -> list[Row]:
    return [_safe_rlhf(better=0, safer=1), _safe_rlhf(better=1, safer=1)]


RATINGS = {"spam": 0.0, "fails_task": 1 / 3, "quality": 0.75, "toxicity": 0.125, "humor": 0.0, "helpfulness": 0.6875}
COUNTS = {"spam": 3, "fails_task": 3, "quality": 4, "toxicity": 4, "humor": 4, "helpfulness": 4, "creativity": 4}


def openassistant() -> list[Row]:
    """A file of replies: the second has no ratings but one for spam."""
    ratings = {**RATINGS, "creativity": 0.9}
    reply = {"message_id": "b", "parent_id": "a", "response": "The Danube.", "rank": 0}
    question = {"role": "prompter", "text": "Name a river."}
    follow_up = [question, {"role": "assistant", "text": "The Danube."}, {"role": "prompter", "text": "Another one."}]
    unrated = {"message_id": "d", "parent_id": "c", "response": "No.", "rank": None}
    return [
        {**reply, "context": [question], "ratings": ratings, "counts": COUNTS},
        {**unrated, "context": follow_up, "ratings": {"spam": 0.0}, "counts": {"spam": 3}},
    ]


def openassistant_hub() -> list[Row]:
    """The messages that those replies were made of, one whose parent is not there, and one in German."""

    def message(identity: str, parent: str | None, role: str, text: str, **rest: Any) -> Row:
        fixed = {
            "review_count": 3,
            "deleted": False,
            "rank": None,
            "message_tree_id": "a",
            "lang": "en",
            "labels": None,
        }
        return {"message_id": identity, "parent_id": parent, "role": role, "text": text, **fixed, **rest}

    def labels(row: Row) -> Row:
        return {
            "name": list(row["ratings"]),
            "value": list(row["ratings"].values()),
            "count": list(row["counts"].values()),
        }

    rated, unrated = openassistant()
    return [
        message("a", None, "prompter", "Name a river.", labels={"name": ["quality"], "value": [1.0], "count": [3]}),
        message("b", "a", "assistant", "The Danube.", labels=labels(rated)),
        message("c", "b", "prompter", "Another one."),
        message("d", "c", "assistant", "No.", labels=labels(unrated)),
        message("e", "c", "assistant", "Removed.", deleted=True),
        message("g", "f", "assistant", "An orphan.", labels=labels(rated)),
        message("h", "a", "assistant", "Die Donau.", labels=labels(rated), lang="de"),
    ]


def openassistant_pairs() -> list[Row]:
    context = [{"role": "prompter", "text": "Name a river."}]
    return [{"context": context, "chosen": "The Danube.", "rejected": "No.", "ranks": [0, 1]}]


def truthfulqa() -> list[Row]:
    row = {"question": "Is the earth flat?", "truthful": 1, "informative": 1}
    return [
        {**row, "answer": "No.", "truthful_votes": [1, 1, 0], "informative_votes": [1, 0, 0]},
        {**row, "answer": "", "truthful_votes": [1], "informative_votes": [0]},
    ]


def truthfulqa_prompts(kind: str) -> list[Row]:
    ending = {"truth": "True:", "info": "Helpful:"}[kind]
    return [
        {"prompt": f"Q: Is the earth flat?\nA: No.\nIt is round.\n{ending}", "completion": " yes"},
        {"prompt": f"Q: Is the earth flat?\nA: \n{ending}", "completion": " no"},
    ]


def hh() -> list[Row]:
    start = "\n\nHuman: Name a river.\n\nAssistant: The Danube.\n\nHuman: Another one."
    return [
        {"chosen": f"{start}\n\nAssistant: The Mekong.", "rejected": f"{start}\n\nAssistant: No."},
        {"chosen": f"{start}\n\nAssistant: Yes.\n\nAssistant: The Nile.", "rejected": f"{start}\n\nAssistant: No."},
        {"chosen": f"{start}\n\nAssistant: The same.", "rejected": f"{start}\n\nAssistant: The same."},
        {"chosen": f"{start}\n\nAssistant: ", "rejected": f"{start}\n\nAssistant: No."},
    ]


def seahorse() -> str:
    """A TSV file: SEAHORSE comes as one."""
    header = "gem_id\tworker_lang\tsummary\tmodel\t" + "\t".join(f"question{i}" for i in range(1, 7))
    return "\n".join(
        [
            header,
            'xsum-1\ten-US\tA \\"river\\" rose.\tt5_xxl\tYes\tYes\tNo\tUnsure\tYes\tNo',
            "mlsum-2\tde\tFluss Fluss.\tmt5_small\tNo\t\t\t\t\t",
            "",
        ]
    )
