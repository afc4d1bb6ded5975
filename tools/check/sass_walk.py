"""A walk over machine code: its loops, what they do after the last wait for products, and which registers a producer
uses. Used by sass.py."""

import re


class Code:
    """The instructions of one kernel and their addresses, and where control goes from each."""

    def __init__(self, addresses: list[int], text: list[str]) -> None:
        self.text = text
        self.at = {address: index for index, address in enumerate(addresses)}

    def following(self, index: int) -> list[int]:
        text = self.text[index]
        target = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", text)
        always = not text.startswith("@")
        places = [self.at[int(target.group(1), 16)]] if target else []
        if not (always and (target or re.match(r"(EXIT|RET)\b", text))) and index + 1 < len(self.text):
            places.append(index + 1)
        return places

    def reachable(self, start: int, without: int) -> set[int]:
        """The instructions that can run after `start` without passing `without`."""
        seen: set[int] = set()
        left = [start]
        while left:
            index = left.pop()
            if index in seen or index == without:
                continue
            seen.add(index)
            left += self.following(index)
        return seen

    def loops(self) -> list[list[int]]:
        """The natural loops: the instructions of each, in the order of the code."""
        found = []
        before: dict[int, list[int]] = {}
        for index in range(len(self.text)):
            for place in self.following(index):
                before.setdefault(place, []).append(index)
        for head, sources in before.items():
            for tail in (source for source in sources if source >= head):
                if tail in self.reachable(0, without=head):  # the head does not dominate: no loop
                    continue
                body, left = {head}, [tail]
                while left:
                    index = left.pop()
                    if index not in body:
                        body.add(index)
                        left += before.get(index, [])
                found.append(sorted(body))
        return found

    def registers_after(self, instruction: str) -> int:
        """How many registers the code needs that can run after an instruction: one more than the highest."""
        start = next(index for index, text in enumerate(self.text) if instruction in text)
        after = self.reachable(start, without=-1)
        return max(
            (int(number) + 1 for index in after for number in re.findall(r"\bR(\d+)", self.text[index])), default=0
        )

    def tile_loop(self, instruction: str) -> list[str]:
        """The longest loop that has this instruction."""
        loops = [[self.text[index] for index in loop] for loop in self.loops()]
        return max((loop for loop in loops if any(instruction in text for text in loop)), key=len, default=[])


def late_exponentials(loop: list[str]) -> int:
    """How many exponentials of a loop come after its last wait for products, when no product is under way."""
    waits = [index for index, text in enumerate(loop) if "WARPGROUP.DEPBAR" in text]
    return sum("MUFU.EX2" in text for text in loop[waits[-1] :]) if waits else 0
