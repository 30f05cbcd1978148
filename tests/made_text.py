"""Text that is made up: sentences of a few words, as many as are wanted, the same in each run."""

import random

NAMES = ["fox", "dog", "river", "clock", "night", "film", "boat", "house"]
VERBS = ["walks", "walked", "walking", "walk", "watches", "watched", "watch"]


def make_text(count):
    generator = random.Random(0)
    lines = []
    for _ in range(count):
        first, second, third = generator.sample(NAMES, 3)
        verb = generator.choice(VERBS)
        lines.append(f"The {first} {verb} to the {second} with a {third}. Is it the {second} of the {first}?")
    return "\n".join(lines) + "\n"
