"""How long greedy text with a small cache is the text with a dense one.

    kvjax agreement --workdir=runs/agreement
    kvjax agreement --config=agreement:long --workdir=runs/agreement

The first takes about five minutes on two CPU cores. The second writes 2000 tokens to each of four prompts: a cache
that holds for a sentence may not hold for pages.
"""

from ml_collections import config_dict

CHATS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many legs do three cats and a bird have?",
    "Translate to German: good morning.",
    "List the planets of the solar system.",
    "Write a Python function that reverses a string.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet, and when?",
    "Summarise: The committee met on 14 March 2021, agreed on nothing, and left at 17:30.",
)
TEXTS = (
    "The quick brown fox",
    "Once upon a time there was a king who had three daughters. The eldest",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4, 5,",
    "In 1969, the first men",
    "Water boils at",
    "<html>\n<head>\n<title>",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of thermodynamics are",
    "Q: What is the largest ocean?\nA:",
)
LONG = (
    "Tell me a long story about a lighthouse keeper, in many chapters.",
    "Explain step by step how a four-stroke engine works, then how it is taken apart and put together again.",
    "Write the rules of a card game that you invent, with ten examples of play.",
    "Describe the history of bread from its beginnings to today, in as much detail as you can.",
)
PROMPTS = {"short": (CHATS, TEXTS, 64), "long": (LONG, (), 2000)}


def get_config(variant: str = "short") -> config_dict.ConfigDict:
    chats, texts, tokens = PROMPTS[variant]
    return config_dict.create(
        model="smollm2-135m",  # a name, a path or a hub name, see kvjax.load
        dtype="float32",  # or bfloat16, float64
        caches="k8v8@kivi,k4v4@kivi,k4v2@kivi,k2v2@kivi",  # plans, see kvjax.caches.plan
        plugins="",  # modules or Python files that register more caches, separated by commas
        chats=chats,  # put into the model's chat template
        texts=texts,  # gone on from as they are
        max_new_tokens=tokens,  # that are generated at most
    )
