"""Adapters in files: four formats written, whatever is meant read, by the names that the live model has."""

from gendiff.lora.files.loading import load as load
from gendiff.lora.files.reading import read as read
from gendiff.lora.files.report import AdapterFile as AdapterFile
from gendiff.lora.files.report import LoadReport as LoadReport
from gendiff.lora.files.saving import save as save
