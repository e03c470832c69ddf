package main

import "github.com/spf13/cobra"

// commands are all there are, in the order in which help lists them.
func commands(a *app) []*cobra.Command {
	return []*cobra.Command{
		newCheckpointCommand(a),
		newRestoreCommand(a),
		newLsCommand(a),
		newInspectCommand(a),
		newDiffCommand(a),
		newRmCommand(a),
		onlyHere(newPruneCommand(a)),
		newPushCommand(a),
		newPullCommand(a),
		newExportCommand(a),
		newImportCommand(a),
		onlyHere(newConvertCommand(a)),
		newVerifyCommand(a),
		onlyHere(newSignCommand(a)),
		onlyHere(newKeyCommand(a)),
		newCheckCommand(a),
		newVersionCommand(a),
		newDocsCommand(a),
		onlyHere(newStageCommand(a)),
	}
}
