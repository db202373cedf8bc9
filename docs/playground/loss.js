// The loss of distillation and its gradient, in plain numbers. Pure functions on arrays of logits.
//
// z: the student's logits, v: the teacher's logits, y: the label, T: the temperature.
//   hard  = −log softmax(z)[y]
//   soft  = T² · KL(softmax(v / T) ‖ softmax(z / T))
//   total = alpha · hard + (1 − alpha) · soft

/** Probabilities of the classes: softmax(logits / temperature). */
export function softmax(logits, temperature = 1) {
  return logSoftmax(logits, temperature).map(Math.exp);
}

/** Logarithms of softmax(logits / temperature). The largest logit is taken off first: no overflow. */
export function logSoftmax(logits, temperature = 1) {
  const scaled = Array.from(logits, (logit) => logit / temperature);
  const largest = Math.max(...scaled);
  const sum = scaled.reduce((total, value) => total + Math.exp(value - largest), 0);
  const logSum = largest + Math.log(sum);
  return scaled.map((value) => value - logSum);
}

/** The class with the largest value. */
export function argmax(values) {
  let best = 0;
  for (let k = 1; k < values.length; k += 1) {
    if (values[k] > values[best]) {
      best = k;
    }
  }
  return best;
}

/** What the label says: cross-entropy of the student's probabilities, at T = 1. */
export function hardLoss(studentLogits, label) {
  return -logSoftmax(studentLogits)[label];
}

/** What the teacher says: T² · KL(teacher ‖ student), both at temperature T. */
export function softLoss(studentLogits, teacherLogits, temperature) {
  const teacher = logSoftmax(teacherLogits, temperature);
  const student = logSoftmax(studentLogits, temperature);
  let divergence = 0;
  for (let k = 0; k < teacher.length; k += 1) {
    divergence += Math.exp(teacher[k]) * (teacher[k] - student[k]);
  }
  // A divergence is never below 0. Rounding may bring the sum there, where both are nearly the same.
  return temperature ** 2 * Math.max(0, divergence);
}

/**
 * The loss for one image, its two parts, and how strongly each pulls at the student's logits.
 *
 * @param {number[]} studentLogits - z, one for each class
 * @param {number[]} teacherLogits - v, one for each class
 * @param {number} label - y
 * @param {number} temperature - T, above 0
 * @param {number} alpha - weight of the label, from 0 to 1; the teacher has 1 − alpha
 * @returns {{total, hard, soft, totalNorm, hardNorm, softNorm}} The losses `hard` and `soft` are
 *   without their weights. The norms are of the gradients with respect to z: of the total, and of
 *   its two parts with their weights.
 */
export function distillationLoss(studentLogits, teacherLogits, label, temperature, alpha) {
  const hard = hardLoss(studentLogits, label);
  const soft = softLoss(studentLogits, teacherLogits, temperature);
  const hardGradient = scale(hardLossGradient(studentLogits, label), alpha);
  const softGradient = scale(
    softLossGradient(studentLogits, teacherLogits, temperature),
    1 - alpha,
  );
  const totalGradient = hardGradient.map((value, k) => value + softGradient[k]);
  return {
    total: alpha * hard + (1 - alpha) * soft,
    hard,
    soft,
    totalNorm: norm(totalGradient),
    hardNorm: norm(hardGradient),
    softNorm: norm(softGradient),
  };
}

/** ∂hard/∂z = softmax(z) − onehot(y) */
export function hardLossGradient(studentLogits, label) {
  return softmax(studentLogits).map((p, k) => p - (k === label ? 1 : 0));
}

/** ∂soft/∂z = T · (softmax(z / T) − softmax(v / T)) */
export function softLossGradient(studentLogits, teacherLogits, temperature) {
  const teacher = softmax(teacherLogits, temperature);
  const student = softmax(studentLogits, temperature);
  return student.map((p, k) => temperature * (p - teacher[k]));
}

/** The length of a vector. */
export function norm(vector) {
  return Math.hypot(...vector);
}

function scale(vector, factor) {
  return vector.map((value) => value * factor);
}
