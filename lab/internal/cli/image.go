package cli

import (
	"context"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/lab/internal/image"
)

func (a *app) imageCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "Container images made from static programs, without Docker"}
	cmd.AddCommand(imageBuildCommand(), imagePushCommand())
	return cmd
}

func imageBuildCommand() *cobra.Command {
	var spec image.Spec
	var programs []string
	var output string
	cmd := &cobra.Command{
		Use: "build --binary PATH[:/TARGET] --name REF -o FILE.tar", Args: cobra.NoArgs,
		Short: "Write an image archive; the same input gives the same bytes",
		RunE: func(*cobra.Command, []string) error {
			for _, s := range programs {
				p, err := image.ParseProgram(s)
				if err != nil {
					return err
				}
				spec.Programs = append(spec.Programs, p)
			}
			return image.Write(spec, output)
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&programs, "binary", nil, "static program to put in, and where; may be given several times")
	f.StringVar(&spec.Name, "name", "", "name of the image, for example local/app:1")
	f.StringVar(&spec.User, "user", "", "numeric user that the container runs as; the default is root")
	f.StringArrayVar(&spec.Entrypoint, "entrypoint", nil, "word of the command line, may be given several times; the default is the first program")
	f.StringArrayVar(&spec.Env, "env", nil, "KEY=VALUE of the environment, may be given several times")
	f.StringVar(&spec.Arch, "arch", "", "architecture as Go calls it; the default is this machine's")
	f.StringVarP(&output, "output", "o", "", "file to write")
	for _, name := range []string{"binary", "name", "output"} {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err) // the flag is defined above
		}
	}
	return cmd
}

func imagePushCommand() *cobra.Command {
	return &cobra.Command{
		Use: "push FILE.tar REF", Short: "Push an image archive to a registry, with Docker's credentials", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error { return push(cmd.Context(), args[0], args[1]) },
	}
}

func push(ctx context.Context, file, ref string) error {
	return image.Push(file, ref, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain))
}
