"""A text of many kinds, on which models are measured before their weights are rounded to 4 bits."""

from __future__ import annotations

from typing import Final

TEXT: Final = """\
The river rises in the northern hills and flows for about 320 kilometres before it reaches the sea.
In 1874 the town built its first bridge, which was replaced by a larger one after the flood of 1911;
today some 48,000 people live there, and most of them work in trade, tourism or the paper mills.

Question: A shop sells pens at $3 each and notebooks at $7 each. Maria buys 4 pens and 2 notebooks
and pays with a $50 note. How much change does she get?
Answer: The pens cost 4 * 3 = $12. The notebooks cost 2 * 7 = $14. Together that is 12 + 14 = $26,
so she gets 50 - 26 = $24 back.

def moving_average(values: list[float], size: int) -> list[float]:
    '''Return the mean of each window of `size` values.'''
    total, result = 0.0, []
    for index, value in enumerate(values):
        total += value
        if index >= size:
            total -= values[index - size]
        if index >= size - 1:
            result.append(total / size)
    return result

"I don't think we should go," she said, looking out at the rain. "Not tonight, anyway. What if the
road is closed again?" He laughed. "Then we'll turn around, make some tea and watch that film you
keep talking about."

User: Can you explain what photosynthesis is, in simple words?
Assistant: Sure! Photosynthesis is how plants make their own food. They take in carbon dioxide from
the air and water from the soil, and with the energy of sunlight they turn them into sugar and
oxygen. In short:
1. Light is absorbed by chlorophyll, the green pigment in leaves.
2. Water is split, and oxygen is released.
3. Carbon dioxide is turned into glucose, which the plant uses to grow.

{"id": 17, "name": "sensor-b", "active": true, "values": [0.25, 1.5, -3.0], "note": null}

Die Bahn fährt heute wegen Bauarbeiten nur bis zum Hauptbahnhof; danach geht es mit dem Bus weiter.
La reunión empieza a las nueve y media, y después comeremos juntos. Il faut ajouter deux œufs, 200 g
de farine et un peu de sel. 今天天气很好，我们去公园散步吧。

SELECT city, COUNT(*) AS orders FROM sales WHERE year >= 2020 GROUP BY city ORDER BY orders DESC LIMIT 10;

The court held that the contract was void because one party had been misled about its terms.
Although the seller argued that the buyer could have read the document, the judges found that a
reasonable person would not have understood clause 12(b).
"""
