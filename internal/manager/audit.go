package manager

import (
	"context"
	"fmt"
	"os"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/inject"
)

// record is what an audit event says of an intercept in force.
type record struct {
	workload corev1.ObjectReference
	text     string // "port 3000 (TCP) by louise, from HOST, intercept web"
	untold   bool   // that it has begun: the intercept's own object comes first
}

func newRecord(in *v1alpha1.Intercept, sess *v1alpha1.Session, w *workload, container string, ports []inject.Taken) record {
	var numbers []string
	for _, p := range ports {
		numbers = append(numbers, fmt.Sprintf("%d (%s)", p.ContainerPort, p.Protocol))
	}
	what := "port " + strings.Join(numbers, ", ")
	switch {
	case len(ports) == 0:
		what = "no port"
	case len(ports) > 1:
		what = "ports " + strings.Join(numbers, ", ")
	}
	switch in.Spec.Mode {
	case v1alpha1.ModeWiretap:
		what = "a copy of " + what
	case v1alpha1.ModeReplace:
		what = "container " + container + ", which does not run, and " + what
	case v1alpha1.ModeIngest:
		what = "environment and files of container " + container
	case v1alpha1.ModeIntercept, v1alpha1.ModeEgress:
	}
	switch requests := requestsOf(&in.Spec); {
	case in.Spec.Mode == v1alpha1.ModeEgress:
		what = "connections out of its pods"
	case requests != "":
		what += ", " + requests + ","
	}
	return record{
		workload: w.reference(),
		untold:   true,
		text:     fmt.Sprintf("%s by %s, from %s, intercept %s", what, in.Spec.User, sess.Spec.Client, in.Spec.Name),
	}
}

// reference names the workload in an event.
func (w *workload) reference() corev1.ObjectReference {
	o := w.Object
	return corev1.ObjectReference{APIVersion: w.APIVersion(), Kind: w.Kind, Namespace: o.GetNamespace(), Name: o.GetName(), UID: o.GetUID()}
}

// tell makes an event on the workload, once for each intercept and reason, also if the manager has been restarted since.
func (m *Manager) tell(ctx context.Context, uid types.UID, r record, reason string) {
	now := metav1.Now()
	host, _ := os.Hostname()
	err := m.ctrl.GetClient().Create(ctx, &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: r.workload.Namespace, Name: fmt.Sprintf("%s.%s.%s", r.workload.Name, uid, map[string]string{eventBegan: "began", eventEnded: "ended", eventRestarted: "restarted"}[reason])},
		InvolvedObject: r.workload, Reason: reason, Message: r.text, Type: corev1.EventTypeNormal,
		Source: corev1.EventSource{Component: objectName, Host: host}, FirstTimestamp: now, LastTimestamp: now, Count: 1,
		ReportingController: v1alpha1.GroupVersion.Group + "/" + objectName, ReportingInstance: m.cfg.PodName,
	})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		m.cfg.Log.Warn("event not written", "object", r.workload.Kind, "name", r.workload.Name, "err", err)
	}
}

// The reasons of events on workloads.
const (
	eventBegan = "Intercepted"
	eventEnded = "InterceptEnded"

	eventRestarted = "RestartedForAgent"
)
