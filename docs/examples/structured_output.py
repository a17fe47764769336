"""Gets JSON of a given schema, whatever the model: python structured_output.py [URL]"""

import json
import sys
import urllib.request

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "country": {"type": "string", "maxLength": 40},
        "inhabitants": {"type": "integer", "minimum": 0},
        "continent": {"enum": ["Africa", "America", "Asia", "Europe", "Oceania"]},
    },
    "required": ["name", "country", "inhabitants", "continent"],
    "additionalProperties": False,
}

request = {
    "messages": [{"role": "user", "content": "Describe the city of Paris as JSON."}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}},
    "temperature": 0,
    "max_tokens": 96,  # the JSON is complete even if this is reached
}
call = urllib.request.Request(
    f"{URL}/v1/chat/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
)
with urllib.request.urlopen(call) as response:
    message = json.load(response)["choices"][0]["message"]

for name, value in json.loads(message["content"]).items():
    print(f"{name}: {value}")
