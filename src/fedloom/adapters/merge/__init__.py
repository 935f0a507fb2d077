"""Adapters merged offline: PEFT folders in, one PEFT folder or one merged model out.

combine.py    one module of every adapter → one pair, by the server's step of a method
folders.py    adapter folders → an adapter folder, module by module
companions.py the other files of a base model, copied by name
base.py       a base model's folder
places.py     where the changes of an adapter go in it
model.py      an adapter folder into the weights of its base model, tensor by tensor
output.py     a folder that is whole or not there
table.py      what was done, for people
command.py    `fedloom aggregate`
"""
