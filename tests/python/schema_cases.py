"""Generates JSON Schemas with values, and prints for each, as a line of JSON, what jsonschema says of the values."""

import json
import random

import jsonschema

VALUES = [None, True, False, 0, 1, 2, -1, 1.0, 1.5, 10, 0.1, "", "a", "ab", "abc", "1", "é", [], [1], [1, 1.0], ["a"], [1, "a"], [None],
          {}, {"a": 1}, {"a": "x"}, {"a": 1, "b": 2}, {"b": {"a": []}}, {"a": {"a": 1}}, [[1], [1]], [{"a": 1}, {"a": 1.0}], {"abc": None}]
TYPES = ["null", "boolean", "object", "array", "string", "number", "integer"]
rnd = random.Random(7)


def schema(depth):
    if depth == 0 or rnd.random() < 0.1:
        return rnd.choice([True, False, {}, {"type": rnd.choice(TYPES)}, {"const": rnd.choice(VALUES)}])
    sub = lambda: schema(depth - 1)
    some = lambda: [sub() for _ in range(rnd.randint(1, 3))]
    names = lambda: {name: sub() for name in rnd.sample(["a", "b", "abc"], rnd.randint(1, 2))}
    keywords = {
        "type": lambda: rnd.choice(TYPES) if rnd.random() < 0.5 else rnd.sample(TYPES, 2),
        "enum": lambda: rnd.sample(VALUES, 4),
        "const": lambda: rnd.choice(VALUES),
        "multipleOf": lambda: rnd.choice([1, 2, 0.5, 0.1]),
        "maximum": lambda: rnd.choice([0, 1, 1.5]),
        "minimum": lambda: rnd.choice([0, 1, 1.5]),
        "exclusiveMaximum": lambda: rnd.choice([0, 1, 2]),
        "exclusiveMinimum": lambda: rnd.choice([0, 1, 0.5]),
        "maxLength": lambda: rnd.randint(0, 2),
        "minLength": lambda: rnd.randint(0, 2),
        "pattern": lambda: rnd.choice(["^a", "b$", "^[0-9]+$", "."]),
        "prefixItems": some,
        "items": sub,
        "contains": sub,
        "maxContains": lambda: rnd.randint(0, 2),
        "minContains": lambda: rnd.randint(0, 2),
        "maxItems": lambda: rnd.randint(0, 2),
        "minItems": lambda: rnd.randint(0, 2),
        "uniqueItems": lambda: rnd.random() < 0.8,
        "properties": names,
        "patternProperties": lambda: {rnd.choice(["^a", "b", "c$"]): sub()},
        "additionalProperties": sub,
        "propertyNames": sub,
        "required": lambda: rnd.sample(["a", "b"], 1),
        "maxProperties": lambda: rnd.randint(0, 2),
        "minProperties": lambda: rnd.randint(0, 2),
        "dependentRequired": lambda: {"a": ["b"]},
        "dependentSchemas": lambda: {"a": sub()},
        "allOf": some,
        "anyOf": some,
        "oneOf": some,
        "not": sub,
        "if": sub,
        "then": sub,
        "else": sub,
        "$ref": lambda: "#/$defs/one",
    }
    return {name: keywords[name]() for name in rnd.sample(sorted(keywords), rnd.randint(1, 4))}


for _ in range(1500):
    root = schema(3)
    if not isinstance(root, dict):
        root = {"allOf": [root]}
    # Another part of the schema, and a recursion through the value.
    one = {"type": ["object", "array", "integer"], "properties": {"a": {"$ref": "#/$defs/one"}}, "items": {"$ref": "#/$defs/one"}}
    root["$defs"] = {"one": rnd.choice([one, {"minimum": 1}, {"type": "string"}])}
    validator = jsonschema.Draft202012Validator(root)
    print(json.dumps({"schema": root, "values": VALUES, "valid": [validator.is_valid(value) for value in VALUES]}))
