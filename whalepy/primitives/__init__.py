"""How a user says what is parallel: four primitives, and `annotate` for models whose code is not edited."""

from whalepy.primitives.annotate import annotate as annotate
from whalepy.primitives.annotate import annotated as annotated
from whalepy.primitives.annotate import scopes_on as scopes_on
from whalepy.primitives.placement import Placement as Placement
from whalepy.primitives.recording import open_chain as open_chain
from whalepy.primitives.recording import recorded_chain as recorded_chain
from whalepy.primitives.recording import recording as recording
from whalepy.primitives.recording import scope_by_id as scope_by_id
from whalepy.primitives.scope import Primitive as Primitive
from whalepy.primitives.scope import cluster as cluster
from whalepy.primitives.scope import replicate as replicate
from whalepy.primitives.scope import split as split
from whalepy.primitives.scope import stage as stage
