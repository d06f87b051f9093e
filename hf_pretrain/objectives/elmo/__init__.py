from hf_pretrain.objectives.elmo.modeling import draw_negatives
