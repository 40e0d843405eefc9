"""Validates an OpenAPI document, read from stdin, and prints its paths."""

import json
import sys

from openapi_spec_validator import validate

document = json.load(sys.stdin)
validate(document)
print(json.dumps(sorted(document["paths"])))
