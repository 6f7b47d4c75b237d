"""Every op, by name."""

from . import bilinear, region, relational

OPS = {spec.name: spec for spec in (*region.SPECS, relational.SPEC, bilinear.SPEC)}
