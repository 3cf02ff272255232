"""Asks an exported policy at two levels, and scores its answers with a reward classifier.

Run ``make quickstart`` first, and export its policy:

    python main.py export --config configs/quickstart/policy.yaml --ckpt_path last --out outputs/quickstart/export
    python examples/python_api.py
"""

import moslim


def main(folder: str = "outputs/quickstart/export", classifier: str = "outputs/quickstart/reward/classifier") -> None:
    """Prints answers and their scores.

    Args:
        folder: Exported policy.
        classifier: Saved reward classifier.
    """
    policy, scorer = moslim.load_policy(folder), moslim.Scorer(classifier)
    for dimension in policy.preferences.dimensions:
        print(f"{dimension.name}: {', '.join(dimension.levels)}")

    question = "How do I clean the kettle?"
    for formality in (0, 4):  # by number, lowest first, or by name
        answer = policy.generate(question, levels={"formality": formality})
        scores = scorer(question, answer)
        print(f"\nformality {formality} requested, {scores.levels['formality']} achieved: {answer}")

    questions = [question, [{"role": "user", "content": "How do I wash the plate?"}]]  # texts and chats
    groups = policy.generate(questions, [{"warmth": 4}, {}], num_generations=3, temperature=0.7, seed=1)
    for asked, answers in zip(questions, groups, strict=True):
        for answer, scores in zip(answers, scorer.score([(asked, answer) for answer in answers]), strict=True):
            print(f"\nexpected warmth {scores.expected['warmth']:.2f}: {answer}")


if __name__ == "__main__":
    main()
