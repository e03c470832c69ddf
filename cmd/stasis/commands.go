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
		newPruneCommand(a),
		newPushCommand(a),
		newPullCommand(a),
		newExportCommand(a),
		newImportCommand(a),
		newConvertCommand(a),
		newVerifyCommand(a),
		newSignCommand(a),
		newKeyCommand(a),
		newCheckCommand(a),
		newVersionCommand(a),
		newDocsCommand(a),
		newStageCommand(a),
	}
}
