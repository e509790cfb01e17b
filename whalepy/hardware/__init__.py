"""The hardware to plan for: device profiles, ClusterSpec, links, detection and matching of ranks.

Only `detect` imports torch.
"""
