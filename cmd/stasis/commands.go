package main

import "github.com/spf13/cobra"

// commands are all there are, in the order in which help lists them.
func commands(a *app) []*cobra.Command {
	return []*cobra.Command{
		anywhere(newCheckpointCommand(a)),
		anywhere(newRestoreCommand(a)),
		anywhere(newLsCommand(a)),
		anywhere(newInspectCommand(a)),
		anywhere(newDiffCommand(a)),
		anywhere(newRmCommand(a)),
		onlyHere(newPruneCommand(a)),
		anywhere(newPushCommand(a)),
		anywhere(newPullCommand(a)),
		anywhere(newExportCommand(a)),
		anywhere(newImportCommand(a)),
		onlyHere(newConvertCommand(a)),
		anywhere(newVerifyCommand(a)),
		onlyHere(newSignCommand(a)),
		onlyHere(newKeyCommand(a)),
		anywhere(newCheckCommand(a)),
		newVersionCommand(a),
		newDocsCommand(a),
		newStageCommand(a),
	}
}
