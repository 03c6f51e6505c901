package userd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/mount"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/wire"
)

// files are an app's volumes on this machine.
type files struct {
	told localapi.Mount // constant
	made bool           // the mount point was made for them
	fs   *mount.FS      // nil: not mounted
	free func()         // lets another intercept have the mount point

	closing sync.Once
}

func (f *files) view() *localapi.Mount {
	if f == nil {
		return nil
	}
	return &f.told
}

// close unmounts. A copy stays, until another intercept wants its place.
func (f *files) close() {
	if f == nil {
		return
	}
	f.closing.Do(func() {
		if f.fs != nil {
			f.fs.Close()
			if f.made {
				_ = os.Remove(f.told.Point) // nothing of ours is in it
			}
		}
		f.free()
	})
}

// ask asks for the environment and the volumes of the container that an intercept is of.
func (x *intercepts) ask(ctx context.Context, in *intercept) (control.Environment, error) {
	var env control.Environment
	m, err := x.s.tunnel(ctx, flowPatience)
	if err != nil {
		return env, uerr.Wrap(err, uerr.NotConnected, "try again when doppel status says that it is up", "the tunnel is away")
	}
	if err := tunnel.Control(ctx, m, control.LaptopEnvironment, control.AskEnvironment{Intercept: x.uidOf(in)}, &env); err != nil {
		return env, uerr.Wrap(err, uerr.Cluster, "a pod whose agent is of an older doppel has them after: kubectl rollout restart", "ask the pod for its environment and volumes")
	}
	return env, nil
}

// uidOf is the UID of the object that stands for the intercept now: another one after a new session had to take the old one's place.
func (x *intercepts) uidOf(in *intercept) string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return string(in.object.UID)
}

// mount puts the volumes of the app onto this machine as the user has asked. What was not asked for is no error if it cannot be had.
func (x *intercepts) mount(ctx context.Context, in *intercept, req localapi.MountRequest, progress localapi.Progress) (*localapi.Mount, error) {
	if req.None || in.object.Spec.Mode == v1alpha1.ModeWiretap {
		return nil, nil
	}
	env, err := x.ask(ctx, in)
	if err != nil {
		return x.unmounted(req, nil, err)
	}
	if len(env.Volumes) == 0 {
		if req == (localapi.MountRequest{}) {
			return nil, nil
		}
		return x.unmounted(req, nil, uerr.New(uerr.NotFound, "the annotation doppel.dev/volumes of the pod template and the chart's value agent.volumes say which are shown", "container %s has no volumes that are shown to laptops", env.Container))
	}
	var paths []string
	for _, v := range env.Volumes {
		paths = append(paths, v.Path)
	}
	if req.ReadWrite && !slices.ContainsFunc(env.Volumes, func(v control.Volume) bool { return !v.ReadOnly }) {
		return x.unmounted(req, paths, uerr.New(uerr.Denied, `ask for the annotation doppel.dev/volumes: "PATH=rw" on the pod template, or for the chart's value agent.volumes`, "all volumes of container %s are read-only for laptops: %s", env.Container, strings.Join(paths, ", ")))
	}
	f := &files{told: localapi.Mount{Volumes: paths, ReadWrite: req.ReadWrite, Copy: req.Copy}}
	ours := req.Point == ""
	if f.told.Point, f.free, err = x.point(in.name, req.Point); err != nil {
		return x.unmounted(req, paths, err)
	}
	if f.made, err = mount.PreparePoint(f.told.Point, req.Copy || ours); err != nil {
		f.free()
		return x.unmounted(req, paths, uerr.Wrap(err, uerr.Usage, "give an empty directory, or one that is not there: --mount PATH", "the mount point"))
	}
	f.made = f.made || ours // it may be left from a daemon that was killed
	progress("Mounting the volumes of container %s on %s", env.Container, f.told.Point)
	cfg := mount.Config{
		Point: f.told.Point, Source: in.object.Namespace + "/" + in.object.Spec.Workload.Name, ReadOnly: !req.ReadWrite, Log: x.s.log,
		Dial: func(ctx context.Context) (io.ReadWriteCloser, error) { return x.openFiles(ctx, in) },
	}
	if req.Copy {
		var left *mount.LeftOutError
		if err = mount.Copy(ctx, cfg); errors.As(err, &left) {
			f.told.LeftOut, err = left.Error(), nil
		}
	} else {
		f.fs, err = mount.Mount(ctx, cfg)
	}
	if err != nil {
		if f.made && !req.Copy {
			_ = os.Remove(f.told.Point)
		}
		f.free()
		hint := ""
		if errors.Is(err, mount.ErrNoFUSE) {
			hint = "install the package fuse3 (and let users open /dev/fuse), or copy the files: --mount-mode copy"
		}
		return x.unmounted(req, paths, uerr.Wrap(err, uerr.Internal, hint, "mount the app's volumes"))
	}
	x.mu.Lock()
	there := x.byName[in.name] == in
	if there {
		in.files = f
	}
	x.mu.Unlock()
	if !there { // ended meanwhile
		f.close()
	}
	return f.view(), nil
}

// unmounted says why the volumes are not there: an error only if the user has asked for them.
func (x *intercepts) unmounted(req localapi.MountRequest, paths []string, err error) (*localapi.Mount, error) {
	if req.Point != "" || req.ReadWrite || req.Copy {
		return nil, err
	}
	x.s.log.Info("volumes not mounted", "err", err)
	return &localapi.Mount{Volumes: paths, Error: err.Error()}, nil
}

// openFiles opens a stream to the file server in a pod of the workload.
func (x *intercepts) openFiles(ctx context.Context, in *intercept) (*mux.Stream, error) {
	m, err := x.s.tunnel(ctx, flowPatience)
	if err != nil {
		return nil, err
	}
	st, _, err := m.Open(ctx, wire.AppendFiles(nil, x.uidOf(in)))
	if err != nil {
		return nil, fmt.Errorf("open the pod's files: %w", err)
	}
	return st, nil
}

// stream opens a stream to the file server for whoever speaks its protocol. It ends with the pod that answers, and with the intercept.
func (x *intercepts) stream(ctx context.Context, name string) (localapi.Stream, error) {
	in, _, err := x.find(name)
	if err != nil {
		return nil, err
	}
	if in.object.Spec.Mode == v1alpha1.ModeWiretap {
		return nil, uerr.New(uerr.Usage, "doppel ingest NAME brings the files beside it", "%s is a wiretap, which has none of the app's files", name)
	}
	st, err := x.openFiles(ctx, in)
	if err != nil {
		return nil, uerr.Wrap(err, uerr.Cluster, "try again, when doppel list -i says that it is ACTIVE", "intercept %s", name)
	}
	return st, nil
}

// find finds an intercept of ours, and its files here.
func (x *intercepts) find(name string) (*intercept, *files, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	in := x.byName[name]
	if in == nil {
		return nil, nil, uerr.New(uerr.NotFound, "see your intercepts with: doppel list -i", "no intercept %q of yours", name)
	}
	return in, in.files, nil
}

// environ is what a local process in the app's place has to have in its environment.
func (x *intercepts) environ(ctx context.Context, name string) (localapi.Environ, error) {
	in, f, err := x.find(name)
	if err != nil {
		return localapi.Environ{}, err
	}
	env, err := x.ask(ctx, in)
	if err != nil {
		return localapi.Environ{}, err
	}
	out := localapi.Environ{Container: env.Container}
	var image map[string]string
	if in.object.Spec.Mode == v1alpha1.ModeReplace { // a stand-in would tell those of its own image
		out.Incomplete = "nothing of it runs while container " + env.Container + " is replaced"
	} else if image, err = x.s.cluster.ContainerEnviron(ctx, in.object.Namespace, env.Pod, env.Container); err != nil {
		out.Incomplete = err.Error()
	}
	out.Variables = variables(env, image)
	out.Variables["DOPPEL_CONTAINER"] = env.Container
	if f != nil {
		out.Variables["DOPPEL_ROOT"] = f.told.Point
		out.Variables["DOPPEL_MOUNTS"] = strings.Join(f.told.Volumes, ":")
	}
	return out, nil
}

// variables are those that an agent has told, and those of the image that are not among them. The container has all, also what an administrator
// keeps from laptops.
func variables(env control.Environment, image map[string]string) map[string]string {
	out := maps.Clone(image)
	if out == nil {
		out = map[string]string{}
	}
	maps.Copy(out, env.Variables)
	for _, name := range env.Hidden {
		delete(out, name)
	}
	return out
}
