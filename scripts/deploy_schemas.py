#!/usr/bin/env python3
"""Makes the schemas in ``tests/schemas``, against which the files in ``docs/deploy`` are checked.

    scripts/deploy_schemas.py compose-spec schema/compose-spec.json
    scripts/deploy_schemas.py LeaderWorkerSet leaderworkerset.x-k8s.io_leaderworkersets.yaml
    scripts/deploy_schemas.py RayJob ray.io_rayjobs.yaml
    scripts/deploy_schemas.py kubernetes _definitions.json

The files are those of the projects named in ``tests/schemas/README.md``. What no check reads is left out: descriptions,
the status of objects, definitions that nothing refers to. Fields that a Kubernetes object does not have are errors, as
``kubectl apply`` has it.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "schemas"
KINDS = {
    "NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "ObjectMeta": "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
    "Service": "io.k8s.api.core.v1.Service",
}
"""Definitions of Kubernetes that are kept, with all that they refer to."""
DEFINITIONS = "$defs"
OPEN = "x-kubernetes-preserve-unknown-fields"


def bare(schema: Any, *, is_map: bool = False) -> Any:
    """A schema without descriptions and extensions. ``is_map``: its keys are names of fields, not keywords."""
    if isinstance(schema, list):
        return [bare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if is_map:
        return {name: bare(each) for name, each in schema.items()}
    maps = ("properties", "definitions", "patternProperties", DEFINITIONS)
    result = {
        key: bare(value, is_map=key in maps)
        for key, value in schema.items()
        if key not in ("description", "title", "default") and not key.startswith("x-kubernetes")
    }
    if "properties" in schema and not schema.get(OPEN):
        result.setdefault("additionalProperties", False)
    return result


def of_custom_resource(path: Path) -> dict[str, Any]:
    """The schema of the newest served version of a custom resource, without its status."""
    definition = yaml.safe_load(path.read_text())
    (version,) = [each for each in definition["spec"]["versions"] if each["storage"]]
    schema: dict[str, Any] = bare(version["schema"]["openAPIV3Schema"])
    del schema["properties"]["status"]
    version_of = f"{definition['spec']['group']}/{version['name']}"
    schema["properties"] |= {
        "apiVersion": {"const": version_of},
        "kind": {"const": definition["spec"]["names"]["kind"]},
    }
    return schema


def of_kubernetes(path: Path) -> dict[str, Any]:
    """The definitions of ``KINDS`` and those that they refer to."""
    every = json.loads(path.read_text())[DEFINITIONS]
    kept: dict[str, Any] = {}
    wanted = list(KINDS.values())
    while wanted:
        name = wanted.pop()
        if name not in kept:
            kept[name] = bare(every[name])
            wanted += references(kept[name])
    kinds = {kind: {"$ref": f"#/{DEFINITIONS}/{name}"} for kind, name in KINDS.items()}
    return {DEFINITIONS: kept | kinds}


def references(schema: Any) -> list[str]:
    """Names of definitions that a schema refers to."""
    if isinstance(schema, list):
        return [name for item in schema for name in references(item)]
    if not isinstance(schema, dict):
        return []
    own = [str(schema["$ref"]).rpartition("/")[2]] if isinstance(schema.get("$ref"), str) else []
    return own + references(list(schema.values()))


def main() -> None:
    """Writes one of the files."""
    readers = {
        "compose-spec": lambda path: without_descriptions(json.loads(path.read_text())),
        "LeaderWorkerSet": of_custom_resource,
        "RayJob": of_custom_resource,
        "kubernetes": of_kubernetes,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=readers)
    parser.add_argument("path", type=Path, help="file of the project")
    options = parser.parse_args()
    text = json.dumps(readers[options.name](options.path), sort_keys=True, separators=(",", ":"))
    target = FOLDER / f"{options.name}.json.xz"
    target.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{target}: {target.stat().st_size} bytes")


def without_descriptions(schema: Any) -> Any:
    """A schema as it is, but for the texts of ``description``. A field of that name is a schema, so it stays."""
    if isinstance(schema, list):
        return [without_descriptions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: without_descriptions(value)
        for key, value in schema.items()
        if key != "description" or not isinstance(value, str)
    }


if __name__ == "__main__":
    main()
