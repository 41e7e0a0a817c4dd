"""Faults that a test has to notice: each is put into a copy of the code by itself, and its test is run.

    python benchmarks/mutants.py                     # all of them, some ten minutes on two cores
    python benchmarks/mutants.py --only sample,fid   # those with one of these words

Prints a line for each, and exits with 1 where a fault survives, where a text to be replaced is not in its file exactly
once, or where a test fails without a fault. The checkout itself is left alone.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as tests/conftest.py has it
sys.dont_write_bytecode = True  # a file may change twice within the second that its cache would notice

import jax  # noqa: F401, E402 (imported before the forks, as are the other libraries that take long)
import matplotlib.figure  # noqa: F401, E402
import optax  # noqa: F401, E402
import orbax.checkpoint  # noqa: F401, E402
import pytest  # noqa: E402
from absl import app, flags  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
KILLED, SURVIVED = 1, 0  # pytest's status for tests that failed, and for tests that passed


# Each test with the faults that it has to notice: `file: text -> what stands there instead`.
TABLE = """
test_report_page.py::test_the_values_under_the_pointer_are_those_that_were_logged
  utils/report/charts.js: x, y: curve.values, mode, line -> x, y: curve.values.slice(1), mode, line
test_report_page.py::test_no_button_sends_a_chart_anywhere
  utils/report/charts.js: modeBarButtons: -> modeBarButtonsToAdd:
test_report_page.py::test_the_axis_of_hours_and_smoothing
  utils/report/charts.js: / 3600; -> / 3000;
  utils/report/charts.js: values[i - window] : null -> values[i - window + 1] : null
test_report_page.py::test_the_slider_changes_the_pictures
  utils/report/report.js: step_of(item) <= step).pop() -> step_of(item) <= step)[0]
  utils/report/report.js: (each) => each.step, step) -> (each) => each.step, 1e9)
  utils/report/data.py: sorted(steps.items()) -> sorted(steps.items(), reverse=True)
test_report_page.py::test_a_button_of_the_legend_hides_its_run_everywhere
  utils/report/charts.js: !curve || !is_shown(i) -> !curve
  utils/report/report.js: line.hidden = state.hidden.includes(line.run) -> line.hidden = false
test_report_page.py::test_tables_are_sorted_and_the_best_is_bold
  utils/report/report.js: descending ? compare(right, left) : compare(left, right) -> compare(left, right)
test_report.py::test_hostile_texts_cannot_end_the_script
  utils/report/data.py: .replace("<", "\\\\u003c") ->
test_report.py::test_a_thinned_curve_keeps_its_ends_and_every_extreme
  utils/report/curves.py: np.argmax, high -> np.argmin, high
test_report.py::test_nan_hides_no_extreme_of_its_section
  utils/report/curves.py: np.where(np.isnan(values), -np.inf, values) -> values
test_report.py::test_any_beginning_of_the_ranked_steps_is_spread_over_all
  utils/report/images.py: [places[-1], places[0]] -> [places[0], places[-1]]
test_report.py::test_the_tables_of_two_runs
  utils/report/data.py: find_best(name, values) -> max(values)
test_report.py::test_watching_writes_again_what_has_changed_until_the_end
  report.py: (now := look_at(runs)) != seen -> (now := look_at(runs))
test_report.py::test_a_film_of_a_panel_has_a_frame_a_step
  report.py: config.film_seconds, config.scale) -> 5.0, config.scale)
test_plot_metrics.py::test_curves_over_hours_and_images
  utils/runs/axes.py: [0, *known], [0.0, *seconds] -> known, seconds[::-1]
test_panels.py::test_a_training_says_which_evaluation_which_scales_and_which_classes
  utils/training/evaluation.py: inner_scale=sampling.inner_scale if config.model.inner_head else 1.0 -> inner_scale=1.0
test_prediction.py::test_the_loss_is_the_error_of_the_data_over_the_divisor
  utils/objectives/flow_matching.py: MIN_REST = 0.05 -> MIN_REST = 0.01
  utils/objectives/flow_matching.py: velocity_to(x_1, x_t, t) if self.prediction == "data" else x_1 - x_0 -> x_1 - x_0
test_prediction.py::test_one_network_in_both_forms_is_one_field
  utils/objectives/flow_matching.py: field = velocity_model(model_fn, self.prediction) -> field = model_fn
test_prediction.py::test_mean_flow_is_the_same_in_both_forms_beyond_the_bound_too
  utils/objectives/mean_flow.py: field = velocity_model(model_fn, self.prediction) -> field = model_fn
  utils/objectives/mean_flow.py: model_fn = velocity_model(model_fn, self.prediction) -> pass
test_prediction.py::test_times_have_the_mean_and_deviation_asked_for
  utils/objectives/flow_matching.py: self.t_sampler, self.t_mean, self.t_std) -> self.t_sampler, self.t_mean)
test_prediction.py::test_training_starts_from_scaled_noise_of_pairs_too
  utils/objectives/flow_matching.py: return scale_noise(draws["x_0"], scale) -> return draws["x_0"]
  utils/objectives/flow_matching.py: x_0 = draw_noise(draws, x_1, self.noise_scale) -> x_0 = draw_noise(draws, x_1)
test_prediction.py::test_samplers_start_from_scaled_noise_and_inversion_ends_at_noise
  utils/sampling/solvers.py: start_path(scale_noise(noise, noise_scale), -> start_path(noise,
  utils/sampling/compiled.py: x_0 = scale_noise(noise, static.noise_scale) -> x_0 = noise
  utils/sampling/compiled.py: return scale_noise(x_0, 1 / static.noise_scale) -> return x_0
  utils/sampling/compiled.py: velocity_fn, scale_noise(noise, static.noise_scale)) -> velocity_fn, noise)
  utils/sampling/generator.py: x = scale_noise(noise, static.noise_scale) -> x = noise
test_prediction.py::test_fresh_noise_is_as_wide
  utils/sampling/solvers.py: t_next, scale_noise(fresh, noise_scale)) -> t_next, fresh)
  utils/sampling/paths.py: fresh = scale_noise(fresh, noise_scale) -> pass
  utils/sampling/paths.py: x_0 = scale_noise(noise, noise_scale) -> x_0 = noise
test_prediction.py::test_likelihoods_are_of_the_scaled_noise
  utils/sampling/density.py: probes, config.num_steps, scale) -> probes, config.num_steps)
  utils/sampling/density.py: **tolerances, noise_scale=scale) -> **tolerances)
test_prediction.py::test_heun_of_predicted_data_ends_with_eulers_step_and_is_inverted
  utils/sampling/compiled.py: solver="heun_euler" if is_cut else sampler.solver -> solver=sampler.solver
  utils/sampling/solvers.py: t_start = jnp.where(t < 1, t, t_next) -> t_start = t
test_prediction.py::test_patches_go_through_two_matrices
  diffusion_transformer.py: else xavier_of_rows if self.bottleneck else xavier_uniform -> else xavier_uniform
test_results.py::test_the_noise_levels_of_a_diffusion_enter_the_key
  utils/runs/results.py: .grid == "objective" -> .grid == "any"
test_train_flow.py::test_training_and_validation_batches_are_of_their_splits
  utils/training/data.py: datasets["validation"], training.batch_size -> datasets["train"], training.batch_size
test_train_flow.py::test_pictures_and_fid_are_of_the_ema_and_losses_of_the_parameters
  utils/training/evaluation.py: = ImageGenerator(run.model, state.ema_params -> = ImageGenerator(run.model, state.params
  utils/training/evaluation.py: from sample_panels(shown, state.ema_params -> from sample_panels(shown, state.params
  utils/training/evaluation.py: reconstruction_panel(shown, state.ema_params -> reconstruction_panel(shown, state.params
  utils/training/evaluation.py: generate(sampler, num_samples -> generate(sampler, 10_000
  utils/training/reference.py: weights = evaluation.inception_weights -> weights = None
  utils/training/reference.py: find_convention(statistics, evaluation.convention) -> find_convention(statistics, "adm")
test_train_flow.py::test_weight_decay_reaches_the_optimizer
  utils/runs/settings.py: weight_decay=self.weight_decay, ->
test_train_flow.py::test_clipping_reaches_the_optimizer
  utils/runs/settings.py: grad_clip=self.grad_clip, ->
test_train_flow.py::test_the_decays_of_adam_reach_the_optimizer
  utils/runs/settings.py: self.beta2 -> 0.99
test_train_flow.py::test_rate_warm_up_and_cosine_reach_the_optimizer
  utils/runs/settings.py: warmup_steps=self.warmup_steps, ->
test_train_flow.py::test_the_state_is_split_as_the_flag_says
  utils/training/build.py: self.config.devices.sharding)) -> "dp"))
test_train_flow.py::test_the_flops_of_a_step_are_those_the_compiler_counts
  utils/training/build.py: return 3 * self.config -> return self.config
test_train_flow.py::test_decay_of_the_ema_and_what_saves_memory_reach_the_step
  utils/training/build.py: remat=config.devices.remat, ->
test_train_flow.py::test_images_are_mirrored_on_request
  utils/runs/settings.py: None if self.random_flip is None else bool(self.random_flip) -> None
test_run_config.py::test_what_an_objective_sets_follows_the_typed_one
  utils/training/configure.py: layers = (drop_derived(recorded, stated), -> layers = (recorded,
  utils/training/configure.py: if name not in derived or value != derived[name]} -> if name not in derived}
test_run_config.py::test_a_typed_preset_wins_over_the_sizes_of_a_file
  utils/training/configure.py: **(sizes(layer[PRESET]) if PRESET in layer else {}), ->
test_run_config.py::test_flags_beside_a_folder_change_the_configuration_of_its_run
  utils/training/configure.py: recorded = {**own, **recorded} -> pass
  utils/training/start.py: (*FIXED, *of_network, -> (*of_network, *FIXED,
test_run_config.py::test_python_is_told_what_a_setting_cannot_be
  utils/training/configure.py: check_run_effects(config, stated) -> pass
test_train_flow.py::test_the_seed_is_that_of_the_first_state
  utils/training/build.py: key = jax.random.key(run.config.training.seed) -> key = jax.random.key(0)
test_config.py::test_options_of_the_data_are_those_of_the_flags
  utils/runs/settings.py: self.max_megapixels, -> 500.0,
  utils/runs/settings.py: self.broken_images, -> "refuse",
test_array_columns.py::test_the_range_is_that_of_training_and_a_given_one_goes_first
  utils/data/columns.py: *(value_range or -> *(None or
  utils/data/columns.py: _measure_range(name, parts["train"], "image") -> _measure_range(name, source, "image")
test_array_columns.py::test_a_file_beside_an_npz_and_one_by_itself_are_mapped
  utils/data/summaries.py: {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} -> x
test_array_columns.py::test_a_mapped_file_is_not_read_into_memory
  utils/data/summaries.py: size = max(1, CHUNK_BYTES // max(1, array.nbytes // len(array))) -> size = len(array)
test_array_columns.py::test_floats_are_trained_on_sampled_and_written_in_their_range
  utils/training/configure.py: inherited["value_range"] = write_range(pixels) -> pass
  sample.py: writer.write(images, conditions) -> writer.write(generator.to_pictures(images), conditions)
test_condition_columns.py::test_columns_are_chosen_by_kind_and_name
  utils/data/arrays.py: places = [known.index(name) for name in self.numbers] -> places = list(range(len(self.numbers)))
test_condition_columns.py::test_other_numbers_are_other_data
  utils/data/columns.py: self.rows, KEYS.values()) -> self.rows, ["image"])
test_condition_columns.py::test_numbers_are_read_row_by_row_and_measured_in_training
  utils/data/columns.py: train = parts["train"] -> train = source
test_objectives.py::test_a_new_objective_is_trained_evaluated_and_resumed
  utils/training/loop.py: keep.keep_every, best, run.config.remote) -> None, best, run.config.remote)
  utils/training/loop.py: Checkpoints(run.folder, keep.keep_last -> Checkpoints(run.folder, 2
  utils/training/loop.py: keep.save_interval, keep.save_minutes -> keep.save_interval, 15
  utils/training/loop.py: run.flops_per_step, config.logging.peak_tflops) -> run.flops_per_step, 1000)
test_train_step.py::test_the_teacher_of_an_objective_is_the_ema
  utils/training/step.py: model_fn(model, ema_params)) -> model_fn(model, params))
test_train_step.py::test_validation_keeps_labels_and_noise_whatever_the_step
  utils/training/step.py: jnp.where(is_validation, VALIDATION, state.step)) -> state.step)
  utils/training/step.py: jnp.where(is_validation, 0.0, model.config -> jnp.where(False, 0.0, model.config
test_train_step.py::test_validation_leaves_the_state_as_it_is_and_measures_the_update_that_it_would_make
  utils/training/step.py: is_kept = is_validation -> is_kept = False
  utils/training/step.py: step=jnp.where(is_validation, state.step, new_state.step) -> step=new_state.step
  utils/training/step.py: map_parts(partial(select, is_kept), old_state, new_state) -> new_state
test_posthoc_ema.py::test_float32_updates_late_in_a_run_are_exact
  utils/networks/posthoc_ema.py: rate = -jnp.expm1( -> rate = 1 - jnp.exp(
test_posthoc_ema.py::test_what_does_not_change_is_its_own_average_at_every_width
  utils/networks/posthoc_ema.py: direction * (1 - weights.sum()) / direction.sum() -> 0
test_posthoc_ema.py::test_inner_products_are_integrals_over_the_steps_of_both
  utils/networks/posthoc_ema.py: (first / t_a) ** g_a * (first / t_b) ** g_b -> (first / t_a) ** g_a
test_posthoc_ema.py::test_a_step_averages_the_trained_parts_over_all_steps
  utils/training/step.py: state.step + 1, is_validation, frozen) -> state.step + 2, is_validation, frozen)
  utils/training/step.py: select(is_validation, state.ema_profiles, profiles) -> profiles
  utils/training/step.py: state.step + 1, is_validation, frozen) -> state.step + 1, is_kept, frozen)
test_posthoc_ema.py::test_a_resumed_run_has_the_profiles_and_snapshots_of_an_uninterrupted_one
  utils/runs/checkpoint.py: if state.ema_profiles else {} -> if False else {}
test_posthoc_ema.py::test_those_that_the_longer_interval_leaves_out_are_dropped
  utils/runs/ema_snapshots.py: if earlier % snapshot_interval(step, self.most): -> if False:
  utils/runs/ema_snapshots.py: if later > step: -> if False:
test_posthoc_ema.py::test_generators_have_any_width
  utils/runs/ema_snapshots.py: if earlier < step: -> if earlier != step:
test_posthoc_ema.py::test_bad_input_ends_in_one_line
  utils/training/start.py: "lr_schedule", "ema_profiles", -> "lr_schedule",
  utils/runs/ema_snapshots.py: if checksum == _checksum(name, exponent, x): -> if True:
test_posthoc_ema.py::test_rows_of_several_widths_and_their_curve
  utils/runs/run_evaluation.py: settings["params"] = self.snapshot.params -> pass
test_packing.py::test_trees_are_packed_and_unpacked_bit_for_bit
  utils/networks/packing.py: start = stop -> start = stop - 1
test_packing.py::test_a_packed_update_is_that_of_each_array
  utils/networks/packing.py: vector[None] if len(self.shapes[group[0]]) > 1 else vector -> vector
test_packing.py::test_the_demos_step_has_few_kernels
  utils/training/step.py: if is_elementwise and is_whole and not frozen else None -> if False else None
test_muon.py::test_updates_are_those_of_optax_for_each_matrix_by_itself
  utils/networks/muon.py: lambda m, g: MOMENTUM * m + (1 - MOMENTUM) * g -> lambda m, g: m
  utils/networks/muon.py: ITERATIONS = 5 -> ITERATIONS = 4
  utils/networks/muon.py: ADAM_RMS * max(rows, columns) ** 0.5 -> ADAM_RMS * rows**0.5
  utils/networks/muon.py: count_matrices(names_of(path), kernel.shape), axis=1) -> 1, axis=1)
  utils/networks/optimizers.py: *([optax.add_decayed_weights(weight_decay)] if weight_decay else []), ->
test_muon.py::test_kernels_inside_the_network_are_split_by_what_they_are_of
  utils/networks/dit_config.py: {"qkv": 3, "key_value": 2} -> {"qkv": 3}
  utils/networks/dit_config.py: or path[0] in ("timestep_embed", "step_embed") ->
test_muon.py::test_a_run_starts_from_parameters_alone
  utils/training/build.py: "is_elementwise": self.config.optimizer.name == "adam", -> "is_elementwise": True,
  utils/runs/settings.py: muon_of=network if self.name == "muon" else None, -> muon_of=None,
test_muon.py::test_eight_devices_with_shards_and_microbatches_are_one
  utils/networks/muon.py: replicated(mesh))[: len(matrices)] -> replicated(mesh))[-len(matrices) :]
test_elementwise.py::test_values_and_derivatives_are_those_of_the_formula
  utils/kernels/elementwise.py: v = v - v.mean(axis=-1, keepdims=True) - y -> v = v - y
  utils/kernels/elementwise.py: (1 + 3 * cubic * y**2) -> (1 + cubic * y**2)
test_environment.py::test_another_kind_of_cpu_or_compiler_has_another_cache
  utils/base/devices.py: [cpu, *versions] -> versions
test_environment.py::test_the_cache_is_turned_off_by_a_flag
  utils/flags/program.py: bool(FLAGS.compilation_cache)) -> True)
test_few_steps.py::test_dropped_labels_are_learned_without_a_step
  utils/objectives/mean_flow.py: h = jnp.where(is_dropped, -> h = jnp.where(is_dropped & False,
test_config.py::test_what_a_run_keeps_cannot_be_another_when_it_resumes
  utils/networks/dit_config.py: "Attention heads.", 1, 2**16 -> "Attention heads.", 1, 2**16, is_fixed=False
test_checkpoint.py::test_processes_of_one_run_save_at_the_step_that_the_first_ones_clock_says
  utils/training/saving.py: jax.process_count() > 1 and self.pause < math.inf -> False
  utils/training/saving.py: elapsed = float(multihost_utils. -> _ = float(multihost_utils.
test_hosts.py::test_missing_files_are_dealt_out_in_turn
  utils/base/hosts.py: missing[jax.process_index() :: jax.process_count()] -> missing[jax.process_index() :: 1]
test_hosts.py::test_a_silent_process_and_one_that_says_so_have_gone
  utils/base/hosts.py: self.signs[other][1] > PATIENCE -> self.signs[other][1] < 0
test_hosts.py::test_the_shares_of_two_processes_are_the_rows_of_one
  utils/images/pixels.py: np.argsort(gather(self.places)) -> np.arange(len(whole))
  compute_fid_stats.py: "process_index": jax.process_index() -> "process_index": 0
test_generate.py::test_what_is_in_the_hole_does_not_enter_its_filling
  utils/sampling/compiled.py: factors[1]).any(axis=(1, 3)) -> factors[1]).all(axis=(1, 3))
test_checkpoint.py::test_host_and_devices_find_the_same_checksum
  utils/runs/checksums.py: np.uint32(start % 2**32) -> np.uint32(0)
test_evaluation.py::test_the_network_is_compiled_twice_for_an_interval_of_guidance_alone
  utils/sampling/compiled.py: if self.has_interval else guided ->
  utils/sampling/compiled.py: has_interval=is_guided and not is_always -> has_interval=not is_always
test_generate.py::test_guidance_and_times_are_those_of_the_sampler
  utils/sampling/compiled.py: tuple(map(float, value)) -> (0.0, 1.0)
test_generate.py::test_tolerances_are_those_of_the_sampler
  utils/sampling/compiled.py: getattr(sampler, name) or 0 -> getattr(sampler, name.replace("atol", "rtol")) or 0
test_edit.py::test_interpolations_begin_and_end_at_the_samples
  utils/sampling/editing.py: slerp(ends[0::2], ends[1::2], fractions) -> slerp(ends[1::2], ends[0::2], fractions)
test_edit.py::test_between_two_classes_the_first_is_on_the_left
  utils/sampling/editing.py: for side in (first, second) -> for side in (second, first)
test_edit.py::test_a_hole_is_filled
  edit.py: request.sampler, config.inpaint_repeats) -> request.sampler, 5)
test_sample.py::test_labels_parameters_and_dtype_are_those_of_the_flags
  utils/flags/drawing.py: params=config.params, ->
  utils/flags/drawing.py: label_mode=config.labels, ->
test_eval_fid.py::test_a_row_of_other_parameters_is_another_row
  utils/runs/run_evaluation.py: "params_sha256": hash_params(params), ->
test_eval_fid.py::test_a_row_says_what_enters_its_numbers
  utils/runs/results.py: settings["cfg_channels"] = sampler.cfg_channels -> pass
  utils/runs/results.py: "time_shift"] = sampler.time_shift -> "time_shift"] = 1
test_eval_fid.py::test_weights_labels_and_batches_are_those_of_the_flags
  utils/runs/run_evaluation.py: label_mode=config.labels, class_counts=counts -> label_mode=config.labels
test_eval_fid.py::test_raw_parameters_are_another_row_which_says_so
  utils/runs/run_evaluation.py: self.model, self.saved, snapshot.params) -> self.model, self.saved)
  utils/runs/run_evaluation.py: settings["params"] = self.snapshot.params -> pass
test_eval_fid.py::test_classes_without_images_are_not_drawn_and_make_another_row
  utils/runs/run_evaluation.py: settings["empty_classes"] = list(empty_classes) -> pass
  utils/conditions/classes.py: tuple(data.get("empty_classes", ()))) -> ())
test_programs.py::test_updates_that_are_not_finite_are_left_out_until_there_are_too_many
  utils/training/build.py: "skips_nonfinite": self.config.optimizer.skip_nonfinite > 0 -> "skips_nonfinite": False
  utils/training/loop.py: SkippedUpdates(config.optimizer.skip_nonfinite, -> SkippedUpdates(2,
test_commands.py::test_a_script_that_has_started_a_program_starts_the_others
  utils/base/commands.py: place > 0 and sys.orig_argv[place + 1 :] == sys.argv[1:] -> place > 0
test_change_this.py::test_an_objective_of_steps_needs_a_network_that_takes_one
  utils/networks/models.py: if model.network.config.step_conditioning else () -> if False else ()
test_fine_tune.py::test_another_network_takes_over_what_has_the_same_shape
  utils/training/start.py: == LABELS and value.shape[1:] == new.shape[1:] -> == LABELS
test_image_sizes.py::test_the_middle_in_the_proportions_of_the_size_is_read
  utils/images/decoding.py: left = (size[1] - width) // 2 -> left = 0
  utils/images/decoding.py: max(1, size[1] * target[0] // target[1]) -> max(1, size[1])
  utils/data/image_folder.py: size = options.size -> size = (min(options.size),) * 2
test_image_modes.py::test_16_bits_are_kept_as_floats_where_all_files_have_them
  utils/images/decoding.py: np.float32(65535 if is_deep else 255) -> np.float32(65536 if is_deep else 255)
  utils/data/image_folder.py: SIXTEEN_BITS if mode == "I;16" else UINT8 -> UINT8
  utils/data/image_folder.py: mode = options.image_mode or listed.mode -> mode = listed.mode
test_image_modes.py::test_images_are_in_colour_if_one_of_them_is
  utils/data/image_folder.py: labels=labels[validation.labels], mode=train.mode -> labels=labels[validation.labels]
  utils/data/image_folder.py: if found != {"I;16"}: -> if "I;16" not in found:
test_image_modes.py::test_a_run_that_is_continued_reads_its_images_as_it_did
  utils/training/configure.py: return _image_mode(saved, settings) | settings -> return settings
  utils/training/configure.py: is_open = _has_mode(draft_data) and -> is_open = False and
test_folder_tables.py::test_numbers_of_a_table_are_the_condition
  utils/data/image_folder.py: {"label": train.labels, **train.columns} -> {"label": train.labels, **listed.columns}
  utils/data/loaders.py: (loader.flips and dataset.own_condition is None) -> loader.flips
  utils/images/tables.py: rows = list(rows) -> rows = sorted(rows)
test_folder_tables.py::test_another_condition_of_an_image_is_another_data_set
  utils/data/image_folder.py: identities = digest_rows(listed.labels, listed.columns) -> pass
test_folder_tables.py::test_labels_of_edm_are_classes
  utils/data/image_folder.py: split = split.take(labelled) -> pass
test_likelihood.py::test_what_is_measured_is_what_the_flags_say
  likelihood.py: jax.random.key(self.config.seed) -> jax.random.key(0)
  likelihood.py: LikelihoodConfig(config.num_probes, -> LikelihoodConfig(1,
test_reflow.py::test_pairs_are_those_of_the_flags
  make_pairs.py: label_mode=config.labels -> label_mode="balanced"
  make_pairs.py: jax_variables=tuple(changed_variables(RANDOM)), ->
test_fid.py::test_statistics_are_of_the_split_and_hold_what_the_flags_say
  compute_fid_stats.py: load_dataset(config.dataset_name, config.split -> load_dataset(config.dataset_name, "train"
  compute_fid_stats.py: ImageStatistics(config.num_features, -> ImageStatistics(10_000,
  compute_fid_stats.py: is_compact=bool(config.compact), ->
test_moments.py::test_moments_are_those_of_numpy
  utils/metrics/pixels.py: weights[:, 0] = 1 -> pass
test_moments.py::test_a_training_scores_what_its_flags_say
  utils/training/reference.py: training_metrics(evaluation.metrics -> training_metrics(("fid",)
test_condition_records.py::test_latents_keep_any_condition
  utils/data/records.py: offset += arrays[-1].nbytes -> pass
test_latents.py::test_what_is_encoded_is_what_the_flags_say
  encode_latents.py: codec, spec, config.shard_size) -> codec, spec, 4096)
test_convert_checkpoint.py::test_the_parameters_that_the_flag_names_are_exported
  convert_checkpoint.py: out, config.params, config.push, picture -> out, "ema", config.push, picture
test_tracking.py::test_what_wandb_shows_is_what_the_flags_say
  utils/trackers/wandb_tracker.py: **options, ->
test_trackers.py::test_lines_say_when_they_were_written_and_how_long_the_run_has_been_running
  utils/trackers/trackers.py: time.monotonic() - last_seconds(self.kept) -> time.monotonic()
  utils/trackers/trackers.py: in metrics_of(line).items(): -> in line.items():
test_trackers.py::test_what_fails_is_named_once_and_left_out
  utils/trackers/trackers.py: del self.trackers[name] -> pass
test_memorisation.py::test_golden_numbers
  utils/metrics/memorisation.py: return (first == 0) | (first -> return (first
  utils/metrics/memorisation.py: COPY_RATIO = 1 / 3 -> COPY_RATIO = np.sqrt(1 / 3)
  utils/metrics/memorisation.py: own_distances < neighbours -> own_distances <= neighbours
  utils/metrics/memorisation.py: (n * m / 2 - 0.5) -> (n * m / 2)
test_memorisation.py::test_bounds_hold
  utils/metrics/memorisation.py: 2 * products - error) -> 2 * products)
test_memorisation.py::test_many_equal_rows_and_ties
  utils/metrics/memorisation.py: np.lexsort((indices, squares, owners)) -> np.lexsort((-indices, squares, owners))
  utils/metrics/memorisation.py: if not len(repaired): -> if True:
test_memorisation.py::test_mirrors_are_views
  utils/metrics/memorisation.py: sum(axis=-1).min(axis=-1) -> sum(axis=-1)[:, 0]
test_dinov2.py::test_features_are_numpys
  utils/metrics/dinov2.py: approximate=False -> approximate=True
  utils/metrics/dinov2.py: a = -0.75 -> a = -0.5
  utils/metrics/dinov2.py: TABLE_SIDE / (side + 0.1) -> TABLE_SIDE / side
  utils/metrics/dinov2.py: neighbours.clip(0, TABLE_SIDE - 1) -> neighbours % TABLE_SIDE
  utils/metrics/dinov2.py: block["scale2"] * _dense -> _dense
  utils/metrics/dinov2.py: (0.485, 0.456, 0.406) -> (0.406, 0.456, 0.485)
  utils/metrics/resizing.py: "bicubic", antialias=True) -> "bicubic", antialias=True).clip(0, 255)
  utils/metrics/resizing.py: "bicubic", antialias=True) -> "bilinear", antialias=True)
  utils/metrics/resizing.py: np.stack(resized, axis=-1).clip(0, 255) -> np.stack(resized, axis=-1)
test_dinov2.py::test_every_librarys_file_is_the_same_network
  utils/metrics/dinov2.py: for letter in "qkv"] -> for letter in "kqv"]
test_dinov2_scores.py::test_others_are_refused
  utils/metrics/reference.py: if recorded not in (None, value): -> if False:
test_dinov2_scores.py::test_a_training_logs_the_distance
  utils/training/reference.py: ExtractorOptions.of(evaluation) -> ExtractorOptions(evaluation.extractor_weights)
test_other_files.py::test_inceptions_are_read
  utils/metrics/other_files.py: "pytorch_fid", -> "adm",
test_memorising.py::test_mirror_images_count_where_the_training_saw_them
  utils/runs/memorising.py: [batch, batch[:, :, ::-1]] if has_mirrors -> [batch] if has_mirrors
test_sweep.py::test_each_snapshot_has_the_row_of_a_call_of_its_own
  utils/runs/run_evaluation.py: if snapshot is self.snapshot or self.use(snapshot): -> if True:
  utils/runs/run_evaluation.py: if self.has_several: -> if False:
  utils/runs/results.py: columns = {"checkpoint_step": "step"} | columns -> pass
test_sweep.py::test_damaged_checkpoints_are_left_out_unless_they_are_named
  utils/runs/run_evaluation.py: if not snapshot.is_optional: -> if False:
test_comparison.py::test_which_values_are_better
  utils/runs/comparison.py: return "highest" if is_higher_better(score) else "lowest" -> return "lowest"
test_comparison.py::test_settings_that_differ_and_no_other
  utils/runs/comparison.py: if len(texts[name]) > 1 -> if texts[name]
  utils/runs/comparison.py: (*START_SETTINGS, "vae" -> ("vae"
test_comparison.py::test_scores_of_evaluations
  utils/runs/comparison.py: values.get(step, math.nan) -> math.nan
test_keep_best.py::test_the_best_have_the_lowest_scores_or_the_highest
  utils/runs/best.py: sign = -1 if is_higher_better(self.keep.score) else 1 -> sign = 1
  utils/runs/best.py: and math.isfinite(scores[step]) ->
test_coupling.py::test_no_permutation_costs_less
  utils/data/coupling.py: linear_sum_assignment(cost)[1] -> np.argsort(linear_sum_assignment(cost)[1])
  utils/data/coupling.py: 2 * data @ noise.T -> data @ noise.T
  utils/data/coupling.py: perm[rows] = rows[assign(cost)] -> perm[rows] = assign(cost)
test_coupling.py::test_noise_stays_standard_normal_given_the_label
  utils/data/coupling.py: np.nonzero(labels == label)[0] -> perm.copy()
  utils/data/coupled.py: (values if len(kind.class_names) > 1 else None), None -> None, None
test_coupling.py::test_noise_is_a_function_of_seed_step_and_row
  utils/data/coupling.py: counter=[0, 0, row, step] -> counter=[0, 0, place, step]
  utils/data/coupling.py: counter=[0, 0, row, step] -> counter=[row, 0, 0, step]
test_coupling.py::test_winners_are_exact_and_fits_the_same_numbers_on_any_machine
  utils/data/coupling.py: winners[row] = candidates[ -> candidates[
test_coupling.py::test_each_point_wins_its_share
  utils/data/coupling.py: self.directions *= np.float32(scale) -> pass
  utils/data/semidiscrete.py: (1 - counts / (size * weights)) -> (counts / (size * weights) - 1)
test_coupling.py::test_a_batch_brings_noise_of_its_own_images_and_validation_that_of_an_uncoupled_run
  utils/training/build.py: coupling=self.coupling) -> coupling=None)
  utils/training/data.py: jax.random.fold_in(unroll(key), VALIDATION) -> unroll(key)
test_coupling.py::test_groups_may_be_smaller_or_larger_than_a_batch
  utils/data/coupled.py: max(1, num_rows // batch_size) -> 1
test_coupling.py::test_semidiscrete_batches_are_of_winners_of_the_rows_labels
  utils/data/coupled.py: batch = read(examples.tolist(), mirrored.astype(bool).tolist()) -> batch = read(*select(step))
  utils/data/coupled.py: return 1 + self.dataset.random_flip -> return 1
test_coupling.py::test_a_run_is_continued_with_its_own_potentials
  utils/data/coupled.py: if not is_new and expected_sha256 not in -> if False and expected_sha256 not in
  utils/training/loop.py: run.record["dataset"]["coupling_sha256"] = sha256 -> pass
  utils/training/start.py: "coupling", "coupling_rows" -> "coupling_rows"
test_keep_best.py::test_a_training_saves_what_it_evaluates_and_keeps_the_best
  utils/training/loop.py: saver.is_due(step, is_evaluated and bool(config.checkpoints.keep_best)) -> saver.is_due(step)
  utils/training/loop.py: best, run.config.remote) -> None, run.config.remote)
test_remote.py::test_objects_are_found_listed_and_read
  utils/storage/remote.py: and _is_path(file.url.removeprefix(start)) ->
  utils/storage/remote.py: file.url.startswith(start) and -> True and
test_remote.py::test_an_object_is_fetched_once_and_anew_when_it_changes
  utils/storage/remote.py: f"{file.version} {file.size}".encode() -> str(file.size).encode()
test_remote.py::test_whenever_it_is_killed_each_marked_checkpoint_is_whole_and_logged
  utils/runs/remote_run.py: for is_marker in (True, False): -> for is_marker in (False, True):
  utils/runs/remote_run.py: sizes.pop(marker, None) -> pass
  utils/runs/remote_run.py: self.push(self.changed(is_run_file)) -> pass
test_remote.py::test_a_save_waits_until_the_one_before_it_is_uploaded
  utils/runs/checkpoint.py: self.remote.wait()  # -> pass  #
test_remote.py::test_what_was_saved_but_not_uploaded_is_uploaded_by_the_next_start
  utils/runs/remote_run.py: self.finish() -> pass
test_remote.py::test_a_copy_of_what_is_no_longer_there_is_no_start
  utils/runs/remote_run.py: if ours == theirs: -> if True:
test_remote.py::test_another_machine_takes_over_and_the_first_returns
  utils/runs/remote_run.py: if step < newest or not is_ours: -> if False:
  utils/runs/remote_run.py: if step < newest or not is_ours: -> if step < newest:
test_remote.py::test_a_damaged_checkpoint_in_storage_is_passed_over
  utils/runs/checkpoint.py: self._fetch(step) -> pass
  utils/runs/checkpoint.py: self.remote.unmark(step) -> pass
test_remote.py::test_a_holder_that_is_alive_keeps_others_away
  utils/storage/lease.py: if now != first: -> if False:
test_readme.py::test_the_layout_names_every_module_and_imports_point_downwards
  docs/layout.md: advice.py -> advise.py
test_reflow.py::test_noise_is_drawn_as_it_was
  utils/data/pairs.py: if theirs != ours: -> if False:
test_eval_fid.py::test_a_row_under_other_settings_of_jax_is_another_row
  utils/runs/run_evaluation.py: if variables := changed_variables(): -> if variables := []:
test_kl_variants.py::test_golden_numbers
  utils/codecs/kl_network.py: if self.has_attention: -> if self.has_attention and i == self.depth - 1:
  utils/codecs/kl_network.py: epsilon=1e-6 -> epsilon=1e-5
  utils/codecs/kl.py: .transpose(0, 1, 3, 5, 2, 4) -> .transpose(0, 1, 3, 2, 4, 5)
  utils/codecs/kl.py: + self.config.batch_norm_eps -> + 0.1 * self.config.batch_norm_eps
  utils/codecs/kl_config.py: return self.decoder_block_out_channels or self -> return self
test_ldm.py::test_published_files_hold_the_same_codec
  utils/codecs/ldm_files.py: {levels - 1 - int(m[1])} -> {int(m[1])}
test_ldm.py::test_statistics_and_scale_are_part_of_the_codec
  utils/codecs/ldm_files.py: std = scale if names[1] == "std" else 1 / scale -> std = scale
  utils/codecs/ldm_files.py: for values in (config.shift, config.scale): -> for values in ():
test_preview.py::test_panels_are_the_viewers_and_numbers_the_codecs
  utils/training/evaluation.py: shown = model if run.viewer is None else -> shown = model if True else
test_saved_codecs.py::test_every_field_is_saved
  utils/codecs/kl_config.py: "down_block_types": [down[has] for has in self.down_attention or none], ->
  utils/codecs/kl_config.py: "_class_name": self.CLASS_NAME -> "_class_name": "AutoencoderKL"
  utils/base/files.py: os.fchmod(file.fileno(), mode) -> pass
test_tiny.py::test_golden_numbers
  utils/codecs/tiny.py: (3 * jnp.tanh(z / 3)) -> z
  utils/codecs/tiny.py: padding=((1, 1), (1, 1)) -> padding=((0, 2), (0, 2))
  utils/codecs/tiny.py: ((x + 1) / 2).astype -> x.astype
  utils/images/pixels.py: (jnp.float32) / 127.5 -> (jnp.float32) / 128
  utils/codecs/tiny.py: x = nn.relu(self.conv(widths[0], next(names))(x)) -> x = self.conv(widths[0], next(names))(x)
test_tiny.py::test_latents_are_cached_as_one_array
  encode_latents.py: images[:, :, ::-1] -> images[:, ::-1]
  utils/data/latents.py: dataset.latents.num_arrays, -> 2,
test_saved_codecs.py::test_what_diffusers_wrote_comes_back
  utils/codecs/tiny.py: "AutoencoderTiny", "act_fn": "relu", "upsampling -> "AutoencoderTiny", "upsampling
test_convert_checkpoint.py::test_what_wrappers_put_before_names_is_no_part_of_them
  utils/convert/sources.py: [model for model in known if model.is_ema] or known -> known[:1]
test_saved_config.py::test_settings_that_cannot_be_are_named
  utils/runs/saved_config.py: type(value) is int and low <= value <= high -> type(value) is int
test_saved_config.py::test_neither_exported_files_nor_checkpoints_of_others_are_trusted
  utils/runs/checkpoint.py: if sums is not None:  # which -> if False:  # which
test_checkpoint.py::test_another_x64_is_no_damage_and_is_named
  utils/runs/checkpoint.py: self._check_types(step, targets) -> pass
test_resume.py::test_changed_settings_are_said_and_another_objective_is_refused
  utils/training/build.py: "jax": jax_settings(), ->
test_environment.py::test_an_environment_in_which_nothing_runs_is_one_line
  utils/flags/program.py: start_devices() -> pass
  utils/flags/program.py: check_jax_settings() -> pass
test_ops.py::test_what_is_masked_is_as_if_it_were_not_there
  utils/kernels/ops.py: bias = jnp.where(mask, 0, MASKED_SCORE) -> bias = jnp.where(mask, 0, -1)
  utils/kernels/ops.py: dquery, dkey, dvalue, *_ = tangents -> dkey, dquery, dvalue, *_ = tangents
test_condition_network.py::test_neither_contents_nor_number_of_masked_tokens_matter
  utils/conditions/tokens.py: jnp.where(mask[..., None], condition["value"], 0) -> condition["value"]
  diffusion_transformer.py: mask = embedded.mask -> mask = None
test_condition_network.py::test_cross_attention_and_channels_start_as_the_network_without_them
  diffusion_transformer.py: Dense(d, self.dtype, zeros_init, name="out")(attended) -> attended
test_condition_network.py::test_class_tokens_are_tokens_of_the_vector
  diffusion_transformer.py: ((query.shape[1] - len(angles), 0), (0, 0)) -> ((0, query.shape[1] - len(angles)), (0, 0))
test_condition_network.py::test_a_run_from_one_of_classes_starts_as_its_no_label
  utils/training/start.py: labels[0 if is_unconditional -> labels[-1 if is_unconditional
test_text.py::test_texts_from_the_shell_python_and_data_are_the_same_arrays
  utils/conditions/tokens.py: [row["text"] for row in rows] -> [row["text"].lower() + "." for row in rows]
test_text.py::test_a_text_is_its_words_in_order
  utils/conditions/text_encoders.py: unicodedata.normalize("NFC", text).casefold() -> text.casefold()
test_augmentation.py::test_changes_are_those_of_scipy
  utils/training/augmentation.py: cosine * y - sine * x -> cosine * y + sine * x
test_augmentation.py::test_the_network_learns_changed_images_and_is_told_how
  utils/training/step.py: (Change(tree, augmentation) for -> (Change(tree, 0 * augmentation) for
test_augmentation.py::test_validation_is_of_images_as_they_are
  utils/training/step.py: jnp.where(is_validation, 0.0, model.condition.prob) -> model.condition.prob
test_augmentation.py::test_what_is_exported_needs_no_word_of_changes
  utils/runs/export.py: "lora_rank": 0, "augment": [], -> "lora_rank": 0,
test_guidance.py::test_both_outputs_learn_and_the_loss_is_that_of_the_last
  utils/training/step.py: model.config.inner_weight * means["inner_loss"] -> means["inner_loss"]
  utils/training/step.py: return means["l2_loss"] + inner, means -> return means["l2_loss"], means
test_guidance.py::test_a_sampler_guides_by_the_inner_head_then_by_labels
  utils/sampling/compiled.py: settings.inner_scale, 1.0) -> 1.0, 1.0)
  utils/sampling/compiled.py: (low <= t) & (t <= high), settings -> t <= high, settings
test_guidance.py::test_another_model_guides_in_every_branch
  utils/sampling/compiled.py: self.guide.field(params.guide) -> self.guide.field(params.model)
  utils/sampling/compiled.py: within(field, own, *settings.guide_interval) -> within(field, own, 0, 1)
test_guidance.py::test_zero_steps_leave_the_noise_as_it_is
  utils/sampling/compiled.py: jnp.maximum(first, static.first_step(settings)) if static.is_zero_star else first -> first
  utils/sampling/compiled.py: static.solver, times, keys, first, scale) -> static.solver, times, keys, 0, scale)
test_guidance.py::test_passes_of_the_network_are_counted
  utils/sampling/compiled.py: 1 + guide_cost * is_on(sampler.guide_interval) -> 1 + guide_cost
test_guidance.py::test_runs_with_an_inner_head_resume_and_are_the_same_on_any_devices
  utils/runs/evaluations.py: settings |= run.guide_settings -> pass
  utils/flags/reading.py: inner_scale=inner, guide_scale=guide -> inner_scale=inner
test_ablation.py::test_other_files_are_refused
  benchmarks/fashion_mnist.py: content[: len(header)] != header or -> False or
test_ablation.py::test_features_are_those_of_the_committed_weights_by_numpy
  benchmarks/fashion_classifier.py: images[..., :1].astype(jnp.float32) / 255 -> images[..., :1].astype(jnp.float32)
test_jax_flow_pickle.py::test_a_pickle_that_runs_something_or_claims_much_is_refused
  utils/base/pickles.py: if not isinstance(array, _Array) or array.value is not None: -> if False:
  utils/base/pickles.py: if (module, name) not in self.allowed: -> if False:
test_jax_flow_pickle.py::test_another_checkpoint_is_refused_by_what_it_has
  utils/convert/jax_flow_files.py: if tree[name].shape != shape: -> if False:
  utils/convert/jax_flow_files.py: if surplus := sorted(tree.keys() - shapes.keys()): -> if surplus := []:
  utils/convert/jax_flow_files.py: or not np.isfinite(tree[name]).all(): -> or False:
  utils/convert/jax_flow_files.py: > MAX_SHARING * len(content): -> > 1e18:
test_jax_flow_pickle.py::test_velocities_and_samples_are_jax_flows
  utils/convert/published.py: {"timestep_scale": 10_000.0, "t_sampler" -> {"timestep_scale": 1.0, "t_sampler"
  utils/convert/jax_flow_files.py: num_heads=heads, -> num_heads=1,
test_jax_flow_pickle.py::test_a_run_has_both_sets_of_parameters_and_the_settings
  utils/convert/jax_flow_files.py: return convert(checkpoint.ema_params), -> return convert(checkpoint.params),
  utils/runs/checkpoint.py: if raw is None else {"ema_params": params, "params": raw} -> if True else {}
test_jax_flow_pickle.py::test_a_training_starts_from_both_sets_and_does_not_continue
  utils/runs/checkpoint.py: "ema_params" in sums and "optimizer" not in sums -> "params" not in sums
test_jax_flow_pickle.py::test_labels_without_a_name_are_left_out
  utils/convert/jax_flow_files.py: tree[name][:count], tree[name][-1:]] -> tree[name][: count + 1]]
test_jax_flow_pickle.py::test_a_table_of_positions_that_one_set_has_trained_is_a_parameter_of_both
  utils/convert/jax_flow_files.py: params.pop("pos_embed", None) -> return params
test_archives.py::test_what_is_no_archive_is_one_line
  utils/storage/archive.py: if row[0] == after[0]: -> if False:
  utils/storage/archive.py: path.startswith("/") or ".." in parts -> False
  utils/storage/zip_files.py: if member.flag_bits & 1: -> if False:
  utils/storage/zip_files.py: member.header_offset + member.compress_size > size: -> False:
  utils/storage/tar_files.py: if file.read(archive.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE): -> if False:
  utils/storage/parquet_files.py: if not file.schema.equals(first.schema): -> if False:
  utils/images/tables.py: or not -1 <= label < count: -> or False:
  utils/images/tables.py: if key in images_of: -> if False:
test_archives.py::test_an_image_that_breaks_later_is_named
  utils/storage/archive.py: if len(content) < HEADER_BYTES or content[:4] != b"PK\\3\\4": -> if False:
test_archives.py::test_an_archive_is_listed_once_and_again_when_it_changes
  utils/storage/archive.py: \\0{self.key}\\0{stamps}" -> \\0{self.key}"
  utils/storage/archive.py: index = Index.load(kept) -> index = None
test_archives.py::test_a_check_that_was_stopped_goes_on
  utils/images/checks.py: if is_lasting and stamps[row] -> if False
test_archives.py::test_images_that_are_trusted_are_not_decoded
  utils/data/image_folder.py: check_images if options.check_images else trust_images -> check_images
test_archives.py::test_joined_data_have_every_image_and_the_shares_that_are_asked_for
  utils/data/joined.py: max(size / weight for -> min(size / weight for
  utils/data/joined.py: np.arange(count) * size // count -> np.minimum(np.arange(count), size - 1)
test_archives.py::test_data_in_object_storage_are_those_on_the_disk
  utils/storage/remote_tree.py: copy.pull(files) -> pass
  utils/storage/remote_tree.py: (copy.folder / name).unlink(missing_ok=True) -> pass
  utils/data/loaders.py: if not (loader.needs_files and is_url(path)): -> if True:
test_archives.py::test_webdataset_has_classes_numbers_and_captions_beside_its_images
  utils/storage/tar_files.py: tree.default_columns = "class" -> pass
test_run_config.py::test_what_an_objective_sets_follows_the_typed_one
  utils/flags/config_file.py: if not (is_typed and isinstance(FLAGS[name], JoinedFlag)): -> if True:
test_container.py::test_its_steps_are_targets_of_the_makefile
  Dockerfile: ARG EXTRAS="" -> ARG EXTRAS=dev
  Makefile: packages: $(STAMP) $(EXTRAS -> packages: $(STAMP) $(STAMP)-dev $(EXTRAS
test_container.py::test_it_runs_without_root_what_is_there
  Dockerfile: USER flow -> USER root
  .dockerignore: tests -> nothing
test_container.py::test_setup_installs_from_the_locks_alone
  Makefile: --require-hashes --requirement -> --requirement
test_container.py::test_all_locks_are_made_by_one_command
  Makefile: LOCKS := $(DEVICES) $(LOCKED) -> LOCKS := $(LOCKED)
test_container.py::test_conda_installs_the_lock
  environment.yml: requirements/cpu.txt -> requirements.txt
test_app.py::test_the_command_of_an_answer_draws_the_very_same_pixels
  utils/app/drawing.py: generator = served.generator.with_seed(ask.seed) -> generator = served.generator
  utils/app/drawing.py: strips = np.swapaxes(self.film, 0, 1) -> strips = np.swapaxes(self.film[::-1], 0, 1)
  utils/app/commands.py: words += ["--seed", ask.seed] -> words += ["--seed", 0]
test_app.py::test_images_between_two_samples_are_those_of_the_command
  utils/app/commands.py: "--interpolate", ask.columns -> "--interpolate", 4
test_app.py::test_own_images_are_changed_as_by_the_command
  utils/app/drawing.py: ask.sampler, ask.repeats) -> ask.sampler, 5)
  utils/app/drawing.py: ask.labels, label) -> ask.labels, ask.labels[0])
test_app.py::test_sizes_are_bounded
  utils/app/requests.py: if count * height * width > MAX_PIXELS: -> if False:
  utils/app/server.py: if len(content) > MAX_UPLOAD_BYTES: -> if False:
  utils/app/requests.py: if image.width * image.height > MAX_UPLOAD_PIXELS: -> if False:
test_app.py::test_other_sites_cannot_ask
  utils/app/server.py: urlsplit(origin).netloc != host: -> False:
  utils/app/server.py: hostname not in LOOPBACK_NAMES: -> hostname is None:
test_app.py::test_faults_of_the_code_are_told_to_the_terminal_alone
  utils/app/server.py: return 500, FAULT -> return 500, str(error)
test_app.py::test_an_answer_names_no_folder
  utils/app/model.py: return folder.name if step is None else -> return str(folder) if step is None else
test_app.py::test_jobs_are_computed_one_after_another_and_can_be_left
  utils/app/jobs.py: if self._is_cancelled.is_set(): -> if False:
  utils/app/jobs.py: if len(self.jobs) > self.limit: -> if False:
test_app_page.py::test_the_classes_that_were_clicked_are_drawn
  utils/app/app.js: body.classes = choosers.classes.chosen; -> body.classes = choosers.classes.chosen.toReversed();
  utils/app/app.js: 0, frame * height, width, -> 0, (shown.frames - 1) * height, width,
  utils/app/drawing.py: {"png": encode_png(image), "title": title} -> {"png": encode_png(image), "title": ""}
test_app_page.py::test_own_images_are_inverted_and_their_hole_is_filled
  utils/app/own.js: isHole ? [255, 255, 255, 255] -> isHole ? [0, 0, 0, 255]
  utils/app/app.js: body.edit = choosers.edit.chosen; -> body.edit = choosers.classes.chosen;
test_app_page.py::test_numbers_are_sliders_within_the_range_of_training
  utils/app/app.js: min: field.low, -> min: 0,
test_app_page.py::test_a_closed_tab_ends_its_request_and_a_second_client_is_served
  utils/app/jobs.py: if self._is_cancelled.is_set(): -> if False:
test_app_page.py::test_hostile_names_are_text_and_nothing_overlaps
  utils/app/app.js: "figcaption", { dir: "auto" }, title) -> "figcaption", { innerHTML: title })
  utils/app/app.css: grid-template-columns: minmax(300px, 380px) minmax(0, 1fr) -> grid-template-columns: 700px 700px
test_app_page.py::test_errors_are_shown_and_the_keyboard_is_enough
  utils/app/app.js: ?.focus(); -> ;
test_bars.py::test_lines_are_written_above_a_bar_in_a_terminal
  utils/base/messages.py: contextlib.suppress(OSError), bars.above_bars(): -> contextlib.suppress(OSError):
  utils/base/bars.py: has_widgets() or sys.stderr.isatty(), -> False,
test_bars.py::test_a_log_file_has_a_line_now_and_then
  utils/base/bars.py: if not is_live(): -> if False:
test_bars.py::test_what_takes_no_time_and_what_is_done_beside_the_program_have_no_bar
  utils/base/background.py: , initializer=hide_bars ->
test_bars.py::test_in_a_notebook_a_bar_is_a_widget_and_without_ipywidgets_text
  utils/base/messages.py: return _Output.is_quiet or bars -> return bars
  utils/base/bars.py: if has_widgets(): -> if False:
test_bars.py::test_of_a_download_from_the_hub_the_bytes_are_shown_alone
  utils/base/bars.py: is_silent or not is_first -> is_silent
test_bars.py::test_the_bar_of_a_training_says_what_it_waits_for
  utils/training/progress.py: self.bar.start_t += seconds -> pass
test_bars.py::test_every_program_has_the_one_flag
  utils/flags/program.py: configure_output(is_quiet=FLAGS.quiet) -> pass
"""


class Mutant(NamedTuple):
    test: str
    file: str
    text: str
    fault: str


def read_table(table: str) -> Iterator[Mutant]:
    test = ""
    for line in table.strip().splitlines():
        if not line.startswith(" "):
            test = line
            continue
        file, _, change = line.strip().partition(": ")
        text, _, fault = change.partition(" ->")
        yield Mutant(test, file, text, fault.strip())


def run_tests(folder: Path, tests: Iterable[str]) -> tuple[int, str]:
    """(pytest's status, its output) for tests of the copy `folder`: in a fork of this process, which has imported the
    libraries but nothing of the project and has touched no device."""
    output = folder / "output.txt"
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder.parent)  # what tests leave goes with it
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if stream == 1 else os.O_APPEND)), stream)
        os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.read_text(encoding="utf-8", errors="replace")


def is_noticed(folder: Path, mutant: Mutant) -> bool:
    """Whether the test fails with the fault in the copy `folder`, which is mended again. SystemExit where pytest itself
    fails, or the fault cannot be put in."""
    path = folder / mutant.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutant.text) != 1:
        sys.exit(f"{mutant.file} has {mutant.text!r} {source.count(mutant.text)} times, not once: mend the table")
    path.write_text(source.replace(mutant.text, mutant.fault), encoding="utf-8")
    try:
        status, output = run_tests(folder, [mutant.test])
    finally:
        path.write_text(source, encoding="utf-8")
    if status not in (KILLED, SURVIVED):
        sys.exit(f"{mutant.test}: pytest ended with {status}\n{output[-3000:]}")
    return status == KILLED


def main(_) -> None:
    words = flags.FLAGS.only or [""]
    mutants = [each for each in read_table(TABLE) if any(word in "".join(each) for word in words)]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        for name in filter(None, listed.split("\0")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
        status, output = run_tests(folder, dict.fromkeys(mutant.test for mutant in mutants))
        if status:
            sys.exit(f"the tests fail without a fault:\n{output[-3000:]}")
        survived = 0
        for mutant in mutants:
            has_survived = not is_noticed(folder, mutant)
            survived += has_survived
            verdict = "SURVIVED" if has_survived else "noticed"
            print(f"{verdict:8}  {mutant.file}: {mutant.text} -> {mutant.fault}   {mutant.test}", flush=True)
    print(f"{len(mutants) - survived} of {len(mutants)} noticed")
    sys.exit(bool(survived))


if __name__ == "__main__":
    flags.DEFINE_list("only", [], "Words of lines of the table, separated by commas.")
    app.run(main)
