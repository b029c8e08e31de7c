"""Checkpoints of a run that any layout can go on from.

entries.py   the entries of a manifest, which check themselves
manifest.py  what a checkpoint holds, as JSON that tells damage, other versions and other runs
files.py     files with a digest
rows.py      the frames of replay, each written once: files of rows that several checkpoints share
storage.py   named tensors through torch.distributed.checkpoint, as raw bytes without pickle
folder.py    where a run's checkpoints lie; which one to go on from, and which to delete
saver.py     writing one beside training, whole or not at all
loader.py    reading one, by parameter name and virtual shard
contents.py  all bytes of one, to compare two
learner.py   a learner's state by parameter name
"""
