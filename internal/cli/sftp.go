package cli

import (
	"context"
	"errors"
	"io"
	"os/exec"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func (a *app) sftpCmd() *cobra.Command {
	var req localapi.FilesRequest
	c := &cobra.Command{
		Use:   "sftp NAME [-- COMMAND [ARG...]]",
		Short: "Speak SFTP with the volumes of an intercept's app, for programs such as sshfs",
		Long: `Sftp joins its standard input and output with the file server of an intercept, replace or ingest of yours: the volumes of the app's
container by SFTP (version 3), each at its own path. So OpenSSH's client is used as: sftp -D "doppel sftp NAME". With a command after --, it is
that command's input and output.

Sftp ends with the intercept, and with the pod that answers: unlike the volumes that doppel mounts, what hangs on it does not outlive a restart
of the pod.`,
		Example: `  doppel sftp web -- sshfs -f -o passive :/ ./web-files`,
		Args:    nameAndCommand,
		RunE: func(c *cobra.Command, args []string) error {
			req.Name = args[0]
			return a.sftpRun(c.Context(), req, args[1:])
		},
	}
	useFlag(c.Flags(), &req.Use, "the one with that intercept")
	return c
}

func (a *app) sftpRun(ctx context.Context, req localapi.FilesRequest, command []string) error {
	if a.Terminal && len(command) == 0 {
		return uerr.New(uerr.Usage, "for example: doppel sftp "+req.Name+" -- sshfs -f -o passive :/ DIR", "SFTP is spoken by programs, not by people at a terminal")
	}
	st, err := a.client.Stream(ctx, localapi.MethodFiles, req)
	if err != nil {
		return err
	}
	defer st.Close()
	if len(command) > 0 {
		return a.sftpCommand(ctx, st, command)
	}
	defer context.AfterFunc(ctx, func() { _ = st.Close() })()
	return pump(st, a.In, a.Out)
}

// sftpCommand ends with the command.
func (a *app) sftpCommand(ctx context.Context, st localapi.Stream, command []string) error {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stderr = a.Err
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	pumped := make(chan struct{})
	go func() {
		defer close(pumped)
		_ = pump(st, out, in) // the command says how it took that
		_ = in.Close()        // so that it sees that nobody answers any more
	}()
	err = attend(ctx, cmd, func() error { return startCommand(cmd) })
	_ = out.Close() // if it was not started
	_ = st.Close()
	<-pumped
	return err
}

// pump copies both ways until the stream ends, or whoever writes to it has nothing more to say.
func pump(st localapi.Stream, in io.Reader, out io.Writer) error {
	said := make(chan struct{})
	go func() {
		defer close(said)
		_, _ = io.Copy(st, in)
		_ = st.CloseWrite()
	}()
	_, err := io.Copy(out, st)
	select {
	case <-said:
		return nil
	default:
	}
	return uerr.Wrap(errors.Join(errors.New("the other end hung up"), err), uerr.Cluster, "start it again while doppel list -i shows the intercept", "the app's files")
}
