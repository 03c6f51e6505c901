package manager

import (
	"context"
	"fmt"
	"os"

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
}

func newRecord(in *v1alpha1.Intercept, sess *v1alpha1.Session, w *workload, port inject.Taken) record {
	what := fmt.Sprintf("port %d (%s)", port.ContainerPort, port.Protocol)
	switch rule := in.Spec.HTTP.Rule(); {
	case in.Spec.Mode == v1alpha1.ModeEgress:
		what = "connections out of its pods"
	case !rule.IsZero():
		what += ", requests with " + rule.String() + ","
	}
	o := w.Object
	return record{
		workload: corev1.ObjectReference{APIVersion: w.APIVersion(), Kind: w.Kind, Namespace: o.GetNamespace(), Name: o.GetName(), UID: o.GetUID()},
		text:     fmt.Sprintf("%s by %s, from %s, intercept %s", what, in.Spec.User, sess.Spec.Client, in.Spec.Name),
	}
}

// tell makes an event on the workload, once for each intercept and reason, also if the manager has been restarted since.
func (m *Manager) tell(ctx context.Context, uid types.UID, r record, reason string) {
	now := metav1.Now()
	host, _ := os.Hostname()
	err := m.ctrl.GetClient().Create(ctx, &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: r.workload.Namespace, Name: fmt.Sprintf("%s.%s.%s", r.workload.Name, uid, map[string]string{eventBegan: "began", eventEnded: "ended"}[reason])},
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
)
